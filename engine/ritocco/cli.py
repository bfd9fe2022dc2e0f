"""The command line: `ritocco predict | demo | doctor | plan | batch | serve | ui`, and what plug-ins add."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ritocco.batch import batch
from ritocco.cli_options import (
    Backend,
    BackendOptions,
    Device,
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
from ritocco.errors import RequestError, RitoccoError
from ritocco.serve import serve, with_page
from ritocco.shown import printable, shown

if TYPE_CHECKING:
    from ritocco.engine import Engine
    from ritocco.prediction import Prediction

app = typer.Typer(
    name="ritocco",
    help="Stable Diffusion inpainting on your own hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ritocco {version('ritocco')}")
        raise typer.Exit


@app.callback()
def _main(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Stable Diffusion inpainting on your own hardware."""
    _tell_of_long_work()


def _tell_of_long_work() -> None:
    """What the library logs of exports and builds, which take minutes, goes to the terminal."""
    logger = logging.getLogger("ritocco")
    if not logger.handlers:
        logger.addHandler(_Terminal())
        logger.setLevel(logging.INFO)


class _Terminal(logging.Handler):
    """Whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(printable(record.getMessage()), err=True)


@app.command()
def predict(
    image: Annotated[str, typer.Option(help="Path or http(s) URL of the picture.")],
    mask: Annotated[str, typer.Option(help="Path or URL of the mask: white is repainted, black is kept.")],
    prompt: Prompt = None,
    negative_prompt: NegativePrompt = None,
    width: Width = None,
    height: Height = None,
    num_outputs: NumOutputs = None,
    num_inference_steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: random.")] = None,
    disable_safety_checker: DisableSafetyChecker = False,
    output_format: OutputFormat = None,
    mask_feather: MaskFeather = None,
    paste_back: PasteBack = True,
    strength: Strength = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("out"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the prediction as JSON, with paths as output.")
    ] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    backend_options: BackendOptions = None,
    memory_budget: MemoryBudget = None,
    variant: Variant = None,
    tokenizer: TokenizerFolder = None,
) -> None:
    """Repaint the white part of a mask."""
    import numpy as np

    from ritocco.backends.engine_store import options_in
    from ritocco.images import encode
    from ritocco.loading import load
    from ritocco.schema import Options, parse_input

    given = {
        "image": image,
        "mask": mask,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_outputs": num_outputs,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        "disable_safety_checker": disable_safety_checker,
    }
    # Before the model is loaded, which may take a while.
    parse_input(given, allow_local=True)
    Options().override(output_format=output_format, mask_feather=mask_feather, strength=strength)
    options = options_in(backend_options)
    suffix = output_format or "png"
    with _disk(out):  # before the work, so that it is not lost
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / f"out-{index}.{suffix}" for index in range(num_outputs or 1)):
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder")
    with load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        backend_options=options,
        memory_budget=memory_budget,
        variant=variant,
        tokenizer=tokenizer,
    ) as engine:
        prediction = _run(engine, given, output_format, mask_feather, paste_back, strength)
    paths = [out / f"out-{index}.{suffix}" for index in range(len(prediction.images))]
    with _disk(out):
        for path, picture in zip(paths, prediction.images, strict=True):
            _replace(path, encode(np.asarray(picture), suffix))
    if as_json:
        printed = prediction.model_copy(update={"output": [str(path) for path in paths] or None})
        # In ASCII, since the progress bars in the log are not in every console's code page.
        typer.echo(json.dumps(printed.model_dump(mode="json"), indent=2))
    else:
        typer.echo(_notes_of(prediction), nl=False, err=True)
        for path in paths:
            typer.echo(path)
    if prediction.error is not None:
        typer.echo(prediction.error, err=True)
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("demo-output"),
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    variant: Variant = None,
    tokenizer: TokenizerFolder = None,
) -> None:
    """Repaint the photograph that ships with ritocco; prints the contact sheet's path last."""
    from ritocco import demo as room
    from ritocco.loading import load

    with _disk(out):
        out.mkdir(parents=True, exist_ok=True)
    engine = load(model, device=device, dtype=dtype, backend=backend, variant=variant, tokenizer=tokenizer)
    with engine, _disk(out):
        typer.echo(room.run(engine, out, say=typer.echo))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Verify this checkpoint too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """What this machine can do: devices, dtypes, backends found and missing."""
    from ritocco.checkpoint_report import verify
    from ritocco.doctor import Line, examine, report

    lines = examine()
    if model is not None:
        lines += [Line(level=f.level, subject=f.subject, message=f.message) for f in verify(Path(model))]
    if as_json:
        rows = [{"level": line.level, "subject": line.subject, "message": line.message} for line in lines]
        typer.echo(json.dumps(rows, indent=2))
    else:
        typer.echo(report(lines))
    if any(line.level == "error" for line in lines):
        raise typer.Exit(1)


@app.command()
def plan(
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 64 up to 1024.")] = 512,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 64 up to 1024.")] = 512,
    num_outputs: Annotated[int, typer.Option(help="Pictures, 1 to 4.")] = 1,
    num_inference_steps: Annotated[int, typer.Option(help="Steps, 1 to 500.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="1 to 20; 1 takes half of the UNet's rows.")] = 7.5,
    scheduler: Annotated[str, typer.Option(help="One of the six names.")] = "DPMSolverMultistep",
    disable_safety_checker: Annotated[
        bool, typer.Option("--disable-safety-checker", help="Plan without its judging; its weights stay.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Run the request too, and print what it really took.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the course of memory into this PNG.")] = None,
    budget: MemoryBudget = None,
    model: Model = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda, which need not be here.")] = "cpu",
    dtype: Dtype = "auto",
    variant: Variant = None,
    tokenizer: TokenizerFolder = None,
) -> None:
    """How much memory a request takes, by phase, and how it keeps to a budget; nothing is loaded.

    --model may be a name that lies nowhere: sd2-inpainting or sd1.5-inpainting.
    """
    from ritocco import graph_report
    from ritocco.artefacts import is_artefacts
    from ritocco.device import check_names
    from ritocco.known import KNOWN
    from ritocco.loading import model_path

    check_names(device, dtype, "torch")
    if check and device != "cpu":
        raise typer.BadParameter("runs the request on this CPU; --device is " + device, param_hint="--verify")
    given = {"width": width, "height": height, "num_outputs": num_outputs, "scheduler": scheduler}
    given |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    given |= {"disable_safety_checker": disable_safety_checker}
    path = model_path(model)
    where: dict[str, Any] = {"variant": variant, "tokenizer": tokenizer}
    if check and str(path) in KNOWN and not path.exists():
        rule = "a model that is known by name has no weights to run; name its folder"
        raise RequestError(f"--model is {shown(str(path))}; {rule}", field="--verify")
    if is_artefacts(path):
        idle: dict[str, Any] = {"budget": budget, "verify": check, "plot": plot, **where}
        idle["device"] = None if device == "cpu" else device
        asked, arenas = graph_report.planned_graphs(path, given, dtype=dtype, **idle)
        if as_json:
            typer.echo(json.dumps(graph_report.graphs_as_json(asked, arenas), indent=2))
        else:
            typer.echo(graph_report.graphs_as_text(asked, arenas))
        return
    from ritocco import plan_report, plan_verify

    fields, found = plan_report.planned(path, given, dtype=dtype, device=device, budget=budget, **where)
    if plot is not None:  # before the request runs, for minutes
        from ritocco.plan_plot import draw

        with _disk(plot, "--plot"):
            draw(found, plot)
    taken: list[Any] = []
    if check:
        how = {"dtype": found.dtype, "memory_budget": budget, **where}
        taken = [plan_verify.allocated(path, fields, **how), plan_verify.resident(path, fields, **how)]
    typer.echo(
        json.dumps(plan_report.as_json(found, *taken), indent=2)
        if as_json
        else plan_report.as_text(found, *taken)
    )


app.command()(batch)
app.command()(serve)
app.command("ui")(with_page())


@contextmanager
def _disk(out: Path, option: str = "--out") -> Iterator[None]:
    """What the disk refuses, as one line and exit status 1."""
    try:
        yield
    except OSError as error:
        message = f"error: {option} is {str(out)!r}, and nothing can be written there: {error}"
        typer.echo(printable(message), err=True)
        raise typer.Exit(1) from error


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a link of that name is replaced, not followed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _run(
    engine: Engine,
    given: dict[str, Any],
    output_format: str | None,
    mask_feather: float | None,
    paste_back: bool,
    strength: float | None,
) -> Prediction:
    bar = tqdm(total=0, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        return engine.predict(
            given,
            on_step=show,
            output_format=output_format,
            mask_feather=mask_feather,
            paste_back=paste_back,
            strength=strength,
        )
    finally:
        bar.close()


def _notes_of(prediction: Prediction) -> str:
    """The log without its progress lines."""
    lines = prediction.logs.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"\s*\d+%\|", line))


def _add_plugins() -> None:
    from ritocco.plugins import plugins

    for plugin in plugins():
        plugin.register(app)


def _stop(number: int, frame: object) -> None:
    """Leave as an error does, so that what is half written goes."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point. Exit status 2 for a bad request, 1 for any other failure of ours."""
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name may be no UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    signal.signal(signal.SIGTERM, _stop)
    try:
        _add_plugins()
        app()
    except RitoccoError as error:
        typer.echo(printable(f"error: {error}"), err=True)
        raise SystemExit(2 if isinstance(error, RequestError) else 1) from None
