"""What `ritocco` finds of this package: the sub-command `ritocco export`, and the exporter for engines.

Light to import: the work is behind the functions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ritocco.artefacts import is_artefacts
from ritocco.backends import installed
from ritocco.errors import BackendError, RequestError
from ritocco.shown import shown

if TYPE_CHECKING:
    from ritocco.checkpoint import Checkpoint

NEEDED = ("onnx", "onnxruntime", "onnxscript")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES |= {name: name for name in DTYPES.values()}


def command(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the graphs; an older export there is replaced.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Check this folder of graphs, and write nothing.")
    ] = None,
    trtexec: Annotated[
        Path | None,
        typer.Option(help="Print trtexec's and polygraphy's commands for this folder of graphs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: the findings as JSON.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder or .safetensors file. Default: RITOCCO_MODEL, else the embedded."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16: of weights and arithmetic.")] = "fp32",
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Sizes that must run, as 512x512@1..4 or 256..1024@1..8 (pixels @ pictures)."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="The one size of the one profile.")] = False,
    layout: Annotated[str, typer.Option(help="ritocco, or optimum for Optimum's names.")] = "ritocco",
    variant: Annotated[str | None, typer.Option(help="fp16 and such, where a folder holds several.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="For a single file: its tokenizer folder.")] = None,
) -> None:
    """Write a checkpoint as ONNX graphs that ONNX Runtime, OpenVINO and TensorRT take."""
    from ritocco.loading import model_path

    if [out, check, trtexec].count(None) != 2:
        raise RequestError(
            "name one of --out, where to write graphs, --check, which graphs to check, and --trtexec, which "
            "graphs to print commands for",
            field="--out",
        )
    if trtexec is not None:
        from ritocco.artefacts import open_artefacts
        from ritocco_export.trtexec import commands

        typer.echo(commands(open_artefacts(trtexec)), nl=False)
        return
    _refuse_missing()
    if check is not None:
        from ritocco_export.report import report

        passed, text = report(check, as_json=as_json)
        typer.echo(text)
        raise typer.Exit(0 if passed else 1)
    assert out is not None  # noqa: S101 - one of the three is given
    if dtype not in DTYPES:
        raise RequestError(f"--dtype is {shown(dtype)}; it must be {', '.join(DTYPES)}", field="--dtype")
    if layout not in ("ritocco", "optimum"):
        raise RequestError(f"--layout is {shown(layout)}; it must be ritocco or optimum", field="--layout")
    from ritocco.checkpoint import open_checkpoint
    from ritocco_export.exporter import export_checkpoint
    from ritocco_export.profiles import Profile

    profiles = [Profile.parse(text) for text in profile or ()]
    path = model_path(model)
    if is_artefacts(path):
        raise RequestError(f"--model is {path}, which holds exported graphs already", field="--model")
    checkpoint = open_checkpoint(path, variant=variant, tokenizer=tokenizer)
    try:
        export_checkpoint(
            checkpoint,
            out,
            dtype=DTYPES[dtype],
            layout="optimum" if layout == "optimum" else "ritocco",
            profiles=profiles,
            static=static,
            say=lambda line: typer.echo(line, err=True),
        )
    except OSError as error:
        typer.echo(f"error: {out}: {error}; nothing was kept", err=True)
        raise typer.Exit(1) from error
    typer.echo(out)


def _refuse_missing() -> None:
    if missing := [name for name in NEEDED if not installed(name)]:
        raise BackendError(f'export needs {", ".join(missing)}; pip install "ritocco[onnx]"')


class Plugin:
    """See `ritocco.plugins.Exporter`."""

    command = staticmethod(command)

    def export(self, checkpoint: Checkpoint, out: Path, *, dtype: str) -> None:
        """Write the checkpoint's graphs to `out`, for every size that a request can have."""
        _refuse_missing()
        from ritocco_export.exporter import export_checkpoint

        export_checkpoint(checkpoint, out, dtype=dtype)


PLUGIN = Plugin()
