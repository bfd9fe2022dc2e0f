"""`ritocco batch`: a folder of pictures at the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ritocco.cli_options import (
    Backend,
    Devices,
    DisableSafetyChecker,
    Dtype,
    GuidanceScale,
    Height,
    MaskFeather,
    MemoryBudget,
    Model,
    NegativePrompt,
    NumOutputs,
    OutputFormat,
    PasteBack,
    Prompt,
    Scheduler,
    Steps,
    Strength,
    TokenizerFolder,
    Variant,
    Width,
)
from ritocco.errors import BackendError, RequestError
from ritocco.folders.manifest import NAME, Manifest
from ritocco.folders.pairs import Bad, Pair, pairs, read_table
from ritocco.folders.sizes import own_size
from ritocco.shown import printable

if TYPE_CHECKING:
    from ritocco.folders.run import Counts

_QUIET_S = 30.0
"""Between two lines of progress where nobody watches."""


def batch(
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    masks: Annotated[Path, typer.Option(help="Folder of masks of the same stems, or one file for all.")],
    out: Annotated[Path, typer.Option(help="Folder of the results and of manifest.jsonl.")],
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None, typer.Option(help="CSV: the column name, and prompt, seed, width or other inputs.")
    ] = None,
    negative_prompt: NegativePrompt = None,
    width: Width = None,
    height: Height = None,
    own_sizes: Annotated[
        bool, typer.Option("--own-sizes", help="Each in its own size, in multiples of 64 up to 1024.")
    ] = False,
    num_outputs: NumOutputs = None,
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    seed: Annotated[
        int | None, typer.Option(help="The same for each. Default: a random one for each.")
    ] = None,
    disable_safety_checker: DisableSafetyChecker = False,
    output_format: OutputFormat = None,
    mask_feather: MaskFeather = None,
    paste_back: PasteBack = True,
    strength: Strength = None,
    model: Model = None,
    device: Devices = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    memory_budget: MemoryBudget = None,
    variant: Variant = None,
    tokenizer: TokenizerFolder = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Paint on a Ray cluster: auto, local or HOST:PORT.")
    ] = None,
) -> None:
    """Repaint a folder of pictures; again, it goes on where it was interrupted.

    Pictures and masks are paired by stem. What was painted from the same pictures and inputs before is not
    painted again. Exit status 1 where some could not be painted; they are listed at the end.
    """
    from ritocco.batcher import Batcher
    from ritocco.disk import hold
    from ritocco.folders.run import FolderRun
    from ritocco.loading import load_on_each
    from ritocco.schema import Options, parse_input

    given = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_outputs": num_outputs,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        "disable_safety_checker": disable_safety_checker or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    options = {"output_format": output_format, "mask_feather": mask_feather, "strength": strength}
    parse_input({"image": "", "mask": "", **given}, allow_local=True)  # what is wrong with all of them
    Options().override(**options)
    options["paste_back"] = paste_back
    if own_sizes and (width or height):
        raise RequestError("--own-sizes and --width or --height are both given; leave one out", field="width")
    if any(out.resolve() == folder.resolve() for folder in (images, masks)):
        rule = "results would lie among the pictures, under their names; name another folder"
        raise RequestError(f"--out is {str(out)!r}; {rule}", field="out")
    table = None if prompts is None else read_table(prompts)
    found, bad, warnings = pairs(images, masks, given, table)
    found, broken = _checked(found, own_sizes=own_sizes, output_format=output_format or "png")
    bad += broken
    for warning in warnings:
        _say(f"warning: {warning}")
    load: dict[str, Any] = {"dtype": dtype, "backend": backend, "memory_budget": memory_budget}
    load |= {"variant": variant, "tokenizer": tokenizer}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(closing(hold(out, "--out", hidden=True)))
            manifest = stack.enter_context(Manifest(out))
            total, interval = len(found) + len(bad), 0.1 if sys.stderr.isatty() else _QUIET_S
            bar = stack.enter_context(tqdm(total=total, unit="picture", mininterval=interval))

            def told(counts: Counts) -> None:
                bar.update(counts.ended - bar.n)

            if ray is not None:
                on_ray = _on_ray(ray, device)
                load |= {"model": model}
                counts = on_ray(found, bad, load=load, out=out, manifest=manifest, options=options, told=told)
            else:
                engines = [stack.enter_context(one) for one in load_on_each(model, device, **load)]
                batcher = stack.enter_context(Batcher(engines))
                counts = FolderRun(batcher, out, manifest, options=options, told=told).run(found, bad)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where this one ended")
        raise typer.Exit(128 + signal.SIGINT) from None
    except OSError as error:
        _say(f"error: --out is {str(out)!r}, and nothing can be written there: {error}")
        raise typer.Exit(1) from error
    typer.echo(
        f"{counts.painted} painted, {counts.skipped} done before, {len(counts.bad)} failed; see {out / NAME}"
    )
    for one in counts.bad:
        _say(f"failed: {one.image.name}: {one.error}")
    if counts.bad:
        raise typer.Exit(1)


def _on_ray(address: str, device: str) -> Callable[..., Counts]:
    """`folders.run` of a cluster."""
    if device != "auto":
        rule = "the cluster's engines have a device each; leave it out with --ray"
        raise RequestError(f"--device is {device!r}; {rule}", field="device")
    try:
        from ritocco.scale import folders
    except ModuleNotFoundError as error:
        raise BackendError(f'--ray needs {error.name}; pip install "ritocco[ray]"') from error
    return partial(folders.run, address)


def _checked(found: Sequence[Pair], *, own_sizes: bool, output_format: str) -> tuple[list[Pair], list[Bad]]:
    """Those whose inputs keep to the schema, the ones of a size together; and the others."""
    from ritocco.folders.run import output_names
    from ritocco.schema import parse_input

    sized: list[tuple[tuple[int, int], Pair]] = []
    bad: list[Bad] = []
    taken: dict[str, str] = {}
    for pair in found:
        try:
            if own_sizes:
                width, height = own_size(pair.image)
                pair = replace(pair, given={"width": width, "height": height, **pair.given})
            fields, _, _ = parse_input(
                {"image": pair.image, "mask": pair.mask, **pair.given}, allow_local=True
            )
            names = [name.casefold() for name in output_names(pair, output_format)]
            if same := next((taken[name] for name in names if name in taken), None):
                raise RequestError(f"its output would have the name of one of {same!r}", field="image")
        except RequestError as error:
            bad.append(Bad.of(pair, str(error)))
        else:
            taken |= dict.fromkeys(names, pair.image.name)
            sized.append(((fields.width, fields.height), pair))
    return [pair for _, pair in sorted(sized, key=lambda one: one[0])], bad


def _say(line: str) -> None:
    typer.echo(printable(line), err=True)
