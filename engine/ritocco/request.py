"""A checked request: the pictures, the seed, the steps, the tokens. Everything that needs no network.

What can be refused is refused here, before the device is asked for.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ritocco.backends.runtime import Floats, Tokens, Traits
from ritocco.errors import RequestError
from ritocco.fetch import MAX_BYTES, Fetcher
from ritocco.images import Inputs, load_inputs
from ritocco.noise import UINT64_END
from ritocco.progress import Log
from ritocco.safety import SafetyChecker
from ritocco.schedules import StepTable, build
from ritocco.schema import Options, PredictionInput

if TYPE_CHECKING:
    from ritocco.prompt import Tokenizer

RANDOM_SEEDS = 1 << 16  # of the original: 0 to 65535
CELL = 8  # pixels per side of a latent cell


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One checked request: what was asked, the pictures, the steps, who judges the results.

    fields: without image and mask, of which `inputs` were made. tokens: of the prompt and, where guidance is
    over 1, of the negative prompt. noise: float32 [4,h,w] for each output, where the caller gave it. safety:
    None where nothing is checked.
    """

    fields: PredictionInput
    options: Options
    inputs: Inputs
    table: StepTable
    seed: int
    tokens: Tokens
    noise: list[Floats] | None
    safety: SafetyChecker | None
    log: Log
    seconds: dict[str, float] = field(default_factory=dict)

    def seed_of(self, output: int) -> int:
        """Output i of seed s has seed s + i; negative seeds count down from 2**64."""
        return (self.seed + output) % UINT64_END

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def prepare(
    fields: PredictionInput,
    options: Options,
    log: Log,
    *,
    tokenizer: Tokenizer,
    scheduler: Mapping[str, Any],
    traits: Traits,
    safety: SafetyChecker | None,
    fetcher: Fetcher | None,
    allow_local: bool,
) -> Request:
    """Check what the fields alone can't tell, open the pictures, build the table of steps.

    scheduler: the checkpoint's config. traits: of the runtime, for the sizes that it takes.
    fetcher, allow_local: for pictures.
    Raises RequestError and FetchError.
    """
    seed = secrets.randbelow(RANDOM_SEEDS) if fields.seed is None else fields.seed
    log.note(f"Using seed: {seed}")
    check_size(fields, traits)
    shape = (4, fields.height // 8, fields.width // 8)
    noise = None
    if options.latents is not None:
        noise = _given_latents(options.latents, fields.num_outputs, shape)
    table = build(fields.scheduler, fields.num_inference_steps, scheduler, strength=options.strength)
    texts = [fields.prompt]
    if fields.guidance_scale > 1:
        texts.append(fields.negative_prompt or "")
    tokens, notes = tokenizer.encode(texts)
    start = time.perf_counter()
    inputs = load_inputs(
        fields.image,
        fields.mask,
        width=fields.width,
        height=fields.height,
        allow_local=allow_local,
        fetcher=fetcher,
        max_bytes=MAX_BYTES if fetcher is None else fetcher.max_bytes,
    )
    log.note(*notes, *table.notes, *inputs.notes)
    if traits.whole_timesteps and (table.timesteps % 1).any():
        log.note(
            f"Warning: {fields.scheduler} uses fractional timesteps, and these graphs take whole ones: "
            "fractions are cut off"
        )
    request = Request(
        # Without the pictures' sources: megabytes, of which nothing is needed any more.
        fields=fields.model_copy(update={"image": "", "mask": ""}),
        options=options,
        inputs=inputs,
        table=table,
        seed=seed,
        tokens=tokens,
        noise=noise,
        safety=None if fields.disable_safety_checker else safety,
        log=log,
    )
    request.seconds["inputs"] = time.perf_counter() - start
    return request


def check_size(fields: PredictionInput, traits: Traits) -> None:
    """Raises RequestError for a width or height that a runtime does not take."""
    multiple = CELL * traits.size_multiple
    sides = (("width", fields.width, traits.widths), ("height", fields.height, traits.heights))
    for name, side, cells in sides:
        if side % multiple:
            rule = f"this checkpoint takes multiples of {multiple}"
            raise RequestError(f"input.{name} is {side}; {rule}", field=f"input.{name}")
        if cells is not None and not cells[0] <= side // CELL <= cells[1]:
            least, most = (CELL * one for one in cells)
            taken = f"{least} to {most}" if least < most else f"{least} alone"
            rule = f"these graphs take {taken}; export others with --profile"
            raise RequestError(f"input.{name} is {side}; {rule}", field=f"input.{name}")
    height, width = fields.height // CELL, fields.width // CELL
    if traits.areas and not any(
        low <= height <= high and left <= width <= right for (low, high), (left, right) in traits.areas
    ):
        raise RequestError(
            f"input.width is {fields.width} and input.height {fields.height}, which none of the "
            f"{len(traits.areas)} profiles of these engines takes together; export others with --profile",
            field="input.width",
        )


def _given_latents(given: Any, count: int, shape: tuple[int, int, int]) -> list[Floats]:
    """The caller's noise, checked: one [4,h,w] for each output."""
    try:
        array = np.asarray(given)
    except Exception as error:  # the caller's object may raise anything
        raise RequestError(f"latents: no array can be made of it ({error})", field="latents") from error
    if array.dtype.kind not in "fiu":
        raise RequestError(f"latents: {array.dtype} values; they must be real numbers", field="latents")
    with np.errstate(over="ignore"):  # what overflows is refused below
        array = array.astype(np.float32)
    if array.shape == shape:
        array = np.broadcast_to(array, (count, *shape))
    if array.shape != (count, *shape):
        raise RequestError(f"latents: shape is {array.shape}; it must be {(count, *shape)}", field="latents")
    if not np.isfinite(array).all():
        raise RequestError("latents: hold NaN or infinity; they must be finite", field="latents")
    return list(array)
