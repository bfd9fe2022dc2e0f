"""A Cog predictor: the same twelve inputs as the server's, in the same order, with the same bounds."""

import tempfile
from pathlib import Path as LocalPath
from typing import Optional

from cog import BasePredictor, Input, Path

import ritocco

SIDES = list(range(64, 1025, 64))
SCHEDULERS = ["DDIM", "K_EULER", "DPMSolverMultistep", "K_EULER_ANCESTRAL", "PNDM", "KLMS"]


class Predictor(BasePredictor):
    """One engine for the life of the container."""

    def setup(self) -> None:
        """Load the checkpoint that lies beside this file."""
        self.engine = ritocco.load("weights")

    def predict(
        self,
        prompt: str = Input(description="What to paint.", default="a vision of paradise. unreal engine"),
        negative_prompt: Optional[str] = Input(description="What not to paint.", default=None),  # noqa: UP045
        image: Path = Input(description="The initial image. It is resized to height x width."),
        mask: Path = Input(description="White pixels are repainted, black pixels are kept."),
        width: int = Input(description="Width of the output in pixels.", choices=SIDES, default=512),
        height: int = Input(description="Height of the output in pixels.", choices=SIDES, default=512),
        num_outputs: int = Input(description="Number of images to make.", ge=1, le=4, default=1),
        num_inference_steps: int = Input(description="Number of denoising steps.", ge=1, le=500, default=50),
        guidance_scale: float = Input(
            description="Scale of classifier-free guidance.", ge=1, le=20, default=7.5
        ),
        scheduler: str = Input(
            description="The scheduler.", choices=SCHEDULERS, default="DPMSolverMultistep"
        ),
        seed: Optional[int] = Input(  # noqa: UP045
            description="Seed of the noise; empty for a random one.", default=None
        ),
        disable_safety_checker: bool = Input(description="Skips the safety checker.", default=False),
    ) -> list[Path]:
        """Repaint the white part of the mask."""
        given = {name: value for name, value in locals().items() if name != "self"}
        prediction = self.engine.predict(given | {"image": str(image), "mask": str(mask)})
        print(prediction.logs, end="")
        if prediction.error is not None:
            raise RuntimeError(prediction.error)
        folder = LocalPath(tempfile.mkdtemp())
        files = [folder / f"out-{number}.png" for number in range(len(prediction.images))]
        for file, picture in zip(files, prediction.images, strict=True):
            picture.save(file)
        return [Path(file) for file in files]
