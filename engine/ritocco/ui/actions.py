"""What the page's controls do, without Gradio: values in, values out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool

from ritocco.errors import RequestError
from ritocco.folders.sizes import MOST, own_size
from ritocco.images import WHITE, data_uri
from ritocco.pixels import Mask
from ritocco.schema import Options, PredictionInput, parse_input
from ritocco.server.problems import problem_of
from ritocco.server.state import Shared
from ritocco.sources import Loader
from ritocco.ui import masks, snippets, words
from ritocco.ui.fields import as_input, changed, entered, fields_of
from ritocco.ui.room import Room
from ritocco.ui.runs import Moment, Runs

SIDES = ("width", "height")
_MASK_NAME = "mask.png"
_LAYERS = 4
_NO_PICTURE = "data:,"
_REPEATED = ("prompt", *SIDES, "num_inference_steps", "guidance_scale", "scheduler")

Layers = Sequence[str] | None
"""The paths of the editor's."""
Edited = Mapping[str, Any]
"""The editor's value: `background` and `layers`, PIL images of one size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What the page shows of a run: HTML, text and code. None leaves as it is what was shown before."""

    message: str
    pictures: str | None = None
    figures: str | None = None
    log: str | None = None
    mask: str | None = None
    python: str | None = None
    curl: str | None = None

    def values(self) -> list[str | None]:
        """In the order of the fields."""
        return [getattr(self, one.name) for one in fields(self)]


class Actions:
    """Those of one app's page. Pictures and layers are paths of files in the room.

    Raises RequestError for whatever a person did wrong.
    """

    def __init__(self, shared: Shared, room: Room) -> None:
        self.inputs, self.options = fields_of(PredictionInput), fields_of(Options)
        self._shared, self._room = shared, room
        self._runs = Runs(shared)
        self._loader = Loader(allow_local=True, max_bytes=shared.settings.max_upload_bytes)

    def open(self, picture: str | None) -> tuple[Edited | None, int, int, str]:
        """Another picture, or none: editor, width, height, note on its size."""
        if picture is None:
            width, height = (self._default(name) for name in SIDES)
            return None, width, height, ""
        edited = self._edited(picture, None)
        width, height = own_size(self._room.inside(picture))
        return edited, width, height, self.note(picture, width, height)

    def note(self, picture: str | None, width: Any, height: Any) -> str:
        """What becomes of the picture's size."""
        if picture is None:
            return ""
        asked = {"image": _NO_PICTURE, "mask": _NO_PICTURE, "width": width, "height": height}
        parsed, *_ = parse_input(asked, allow_local=False)
        file = self._room.inside(picture)
        with self._loader.flat(file.read_bytes(), field="input.image", ground=WHITE) as found:
            return words.sizes(file.name, found.size, (parsed.width, parsed.height))

    def load_mask(self, picture: str | None, layers: Layers, file: str | None) -> Edited:
        """A mask from a file, stretched over the picture."""
        mask = self._painted(layers)
        if file is not None:
            mask = masks.read(self._room.inside(file).read_bytes(), loader=self._loader)
        return self._edited(picture, lambda _, size: None if mask is None else masks.resized(mask, *size))

    def invert(self, picture: str | None, layers: Layers) -> Edited:
        """Black for white."""
        return self._edited(picture, lambda mask, _: ~mask, layers)

    def clear(self, picture: str | None) -> Edited:
        """No mask."""
        return self._edited(picture, None)

    def grow(self, picture: str | None, layers: Layers, pixels: Any) -> Edited:
        """With all that is near the white."""
        return self._edited(picture, lambda mask, _: masks.grown(mask, pixels), layers)

    async def run(
        self, picture: str | None, layers: Layers, values: Sequence[Any], *, base: str, page: str
    ) -> AsyncIterator[Shown]:
        """From what stands in the controls to pictures. Closing the generator cancels the prediction.

        values: of the inputs, then of the options. base: URL of the API. page: names the page, for `cancel`.
        """
        given = entered(self.inputs, values[: len(self.inputs)])
        options = changed(self.options, entered(self.options, values[len(self.inputs) :]))
        if picture is None:
            raise RequestError("input.image is missing; load a picture", field="input.image")
        file = self._room.inside(picture)
        mask, pictures = await run_in_threadpool(self._sent, file, layers)
        later = snippets.LATER
        yield Shown(
            message=words.status("Sending"),
            pictures="",
            figures="",
            log="",
            mask="",
            python=later,
            curl=later,
        )
        asked = pictures | as_input(given, options)
        async for moment in self._runs.follow(asked, base=base, page=page):
            if not moment.ended:
                yield _meanwhile(moment)
                continue
            again = {name: given[name] for name in _REPEATED} | changed(self.inputs, given)
            if moment.seed is not None:
                again["seed"] = moment.seed
            token = bool(self._shared.sessions.tokens)
            yield Shown(
                message=_message(moment),
                pictures=_results(moment, given),
                figures=words.figures(moment.metrics, seed=moment.seed, id=moment.id),
                log=moment.logs,
                mask=words.mask_link(mask, _MASK_NAME),
                python=snippets.python_of(file.name, _MASK_NAME, again, options),
                curl=snippets.curl_of(
                    file.name, _MASK_NAME, as_input(again, options), base=base, token=token
                ),
            )

    def cancel(self, page: str) -> None:
        """End what a page runs."""
        self._runs.cancel(page)

    def _default(self, name: str) -> int:
        return next(int(field.default) for field in self.inputs if field.name == name)

    def _sent(self, file: Path, layers: Layers) -> tuple[bytes, dict[str, str]]:
        """The mask's file, and picture and mask as inputs; their types are not believed."""
        mask = masks.png_of(masks.refuse_empty(self._painted(layers)))
        return mask, {"image": data_uri(file.read_bytes()), "mask": data_uri(mask)}

    def _painted(self, layers: Layers) -> Mask | None:
        if len(layers or ()) > _LAYERS:
            raise RequestError(
                f"input.mask has {len(layers or ())} layers; at most {_LAYERS} are read", field="input.mask"
            )
        read = [self._room.inside(layer).read_bytes() for layer in layers or ()]
        return masks.from_layers(read, loader=self._loader)

    def _edited(
        self,
        picture: str | None,
        change: Callable[[Mask, tuple[int, int]], Mask | None] | None,
        layers: Layers = None,
    ) -> Edited:
        """The editor's value, with what `change` makes of mask and size; without a mask where it is None."""
        if picture is None:
            raise RequestError("input.image is missing; load a picture first", field="input.image")
        data = self._room.inside(picture).read_bytes()  # a path would be named in errors
        with self._loader.flat(data, field="input.image", ground=WHITE) as found:
            background = found.copy()
            background.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
        width, height = background.size
        mask = None
        if change is not None:
            before = self._painted(layers)
            mask = change(np.zeros((height, width), bool) if before is None else before, background.size)
        shown = [] if mask is None or not mask.any() else [masks.layer_of(mask)]
        return {"background": background, "layers": shown, "composite": None}


def message_of(error: Exception) -> str:
    """An error as the API words it, which keeps what is of the server's inside to its log."""
    problem = problem_of(error)
    return words.alert(problem.title, problem.detail)


def _meanwhile(moment: Moment) -> Shown:
    if moment.total:
        text = f"Step {moment.done} of {moment.total}"
    else:
        text = "Starting" if moment.status == "processing" else "Waiting for a place"
    return Shown(
        message=words.status(text, done=moment.done, total=moment.total),
        pictures=None if moment.previews is None else words.previews(moment.previews),
        log=moment.logs,
    )


def _message(moment: Moment) -> str:
    if moment.status == "failed":
        return words.alert("The prediction failed", moment.error or "")
    if moment.set_aside:
        return words.alert("The server stops", "It runs this prediction after its next start.")
    return words.status("Canceled" if moment.status == "canceled" else "Done")


def _results(moment: Moment, given: Mapping[str, Any]) -> str:
    urls = [f"../v1/outputs/{one.id}/{one.name}" for one in moment.outputs]
    # Where some were dropped, nobody knows whose seed is left.
    whole = moment.seed is not None and len(urls) == given["num_outputs"]
    seeds = [(moment.seed or 0) + place for place in range(len(urls))] if whole else []
    return words.results(urls, prompt=str(given["prompt"]), seeds=seeds) if urls else ""
