"""What `ritocco` finds of this package: the sub-command `ritocco export`, and the exporter for engines.

Light to import: the work is behind the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ritocco.artefacts import is_artefacts
from ritocco.backends import EXPORT_PACKAGES, export_extra, installed
from ritocco.errors import BackendError, RequestError
from ritocco.shown import printable, shown

if TYPE_CHECKING:
    from ritocco.artefacts import Artefacts
    from ritocco.backends.engine_store import EngineOptions
    from ritocco.backends.tensorrt_library import Library
    from ritocco.checkpoint import Checkpoint
    from ritocco.graph_plan import GraphPlan, Sizes
    from ritocco.nets.io import GraphName, Layout
    from ritocco.plugins import Say

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPES |= {name: name for name in DTYPES.values()}


# What each use of the command takes beside the options that make it that use.
_TAKES = {
    ("out",): {"model", "dtype", "profile", "static", "layout", "hoisted", "variant", "tokenizer"},
    ("check",): {"as_json", "model", "variant", "tokenizer"},
    ("trtexec",): set[str](),
    ("triton",): {"graphs", "instances", "accelerator"},
    ("engines",): {"library", "target", "refit", "backend_options"},
    ("out", "engines"): {"library", "target", "refit", "backend_options"},
}


def _folder(text: str) -> Path:
    if not text:
        raise typer.BadParameter("'' names no folder")
    return Path(text)


def command(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=_folder, metavar="FOLDER", help="Folder of the graphs; an older export there is replaced."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            parser=_folder, metavar="FOLDER", help="Check this folder of graphs, and write nothing."
        ),
    ] = None,
    trtexec: Annotated[
        Path | None,
        typer.Option(
            parser=_folder,
            metavar="FOLDER",
            help="Print trtexec's and polygraphy's commands for this folder of graphs.",
        ),
    ] = None,
    engines: Annotated[
        Path | None,
        typer.Option(
            parser=_folder,
            metavar="FOLDER",
            help="Build TensorRT engines of this folder of graphs; --out, or the cache, takes them.",
        ),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(
            parser=_folder,
            metavar="FOLDER",
            help="Write a model repository for Triton Inference Server there, of the graphs in --graphs.",
        ),
    ] = None,
    graphs: Annotated[
        Path | None,
        typer.Option(parser=_folder, metavar="FOLDER", help="With --triton: the folder of graphs."),
    ] = None,
    instances: Annotated[
        int, typer.Option(min=1, help="With --triton: predictions at a time, whose UNet calls share batches.")
    ] = 4,
    accelerator: Annotated[
        str, typer.Option(help="With --triton: tensorrt, which builds engines at the first start, or none.")
    ] = "tensorrt",
    library: Annotated[
        str, typer.Option(help="With --engines: tensorrt, for the GPU at hand, or tensorrt-rtx.")
    ] = "tensorrt-rtx",
    target: Annotated[
        list[str] | None,
        typer.Option(help="With --engines and tensorrt-rtx: sm86, sm89, sm120 ...; no such GPU is needed."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="With --engines: for all checkpoints of this shape.")
    ] = False,
    backend_options: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="With --engines: as for predict; see docs/export.md."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: the findings as JSON.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder or .safetensors file. Default: RITOCCO_MODEL, else the embedded. "
            "With --check: what the graphs were made of; parity is measured again."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16: of weights and arithmetic.")] = "fp32",
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Sizes that must run, as 512x512@1..4 or 256..1024@1..8 (pixels @ pictures)."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="The one size of the one profile.")] = False,
    layout: Annotated[str, typer.Option(help="ritocco, or optimum for Optimum's names.")] = "ritocco",
    hoisted: Annotated[
        bool, typer.Option("--hoisted", help="The UNet in two graphs: once a request, and the step.")
    ] = False,
    variant: Annotated[str | None, typer.Option(help="fp16 and such, where a folder holds several.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="For a single file: its tokenizer folder.")] = None,
) -> None:
    """Write a checkpoint as ONNX graphs that ONNX Runtime, OpenVINO and TensorRT take."""
    from ritocco.loading import model_path

    folders = {"out": out, "check": check, "trtexec": trtexec, "triton": triton, "engines": engines}
    named = [name for name, folder in folders.items() if folder is not None]
    if tuple(named) not in _TAKES:
        raise RequestError(
            "name one of --out, where to write graphs, --check, which graphs to check, --trtexec, which to "
            "print commands for, --triton, where to write a model repository, and --engines, which to build "
            "engines of",
            field="--out",
        )
    _refuse_idle(context, tuple(named))
    if trtexec is not None:
        from ritocco.artefacts import open_artefacts
        from ritocco_export.trtexec import commands

        typer.echo(commands(open_artefacts(trtexec)), nl=False)
        return
    if triton is not None:
        _write_repository(triton, graphs, instances, accelerator)
        return
    if engines is not None:
        _build(engines, out, library=library, targets=target or [], refit=refit, given=backend_options)
        return
    _refuse_missing()
    if check is not None:
        from ritocco_export.report import report

        made_of = _made_of(model, variant=variant, tokenizer=tokenizer)
        passed, text = report(check, as_json=as_json, checkpoint=made_of)
        typer.echo(text)
        raise typer.Exit(0 if passed else 1)
    assert out is not None  # noqa: S101 - it is what is named where none of the others is
    _write(
        model_path(model),
        out,
        dtype=dtype,
        profiles=profile or [],
        static=static,
        layout=layout,
        hoisted=hoisted,
        variant=variant,
        tokenizer=tokenizer,
    )
    typer.echo(out)


def _made_of(model: str | None, *, variant: str | None, tokenizer: Path | None) -> Checkpoint | None:
    """The checkpoint beside which `--check` measures parity again, if one is named."""
    from ritocco.checkpoint import open_checkpoint
    from ritocco.loading import model_path

    if model is None:
        for option, given in (("--variant", variant), ("--tokenizer", tokenizer)):
            if given is not None:
                raise RequestError(f"{option} does nothing with --check without --model", field=option)
        return None
    if is_artefacts(path := model_path(model)):
        rule = "which holds exported graphs; name the checkpoint that they were made of"
        raise RequestError(f"--model is {shown(model)}, {rule}", field="--model")
    return open_checkpoint(path, variant=variant, tokenizer=tokenizer)


def _refuse_idle(context: typer.Context, named: tuple[str, ...]) -> None:
    """Raises RequestError for options that this use of the command would not look at."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in (*named, *_TAKES[named]) or source is None or source.name == "DEFAULT":
            continue
        use = " ".join(f"--{name}" for name in named)
        takes = ", ".join(sorted(name.replace("as_json", "json").replace("_", "-") for name in _TAKES[named]))
        raise RequestError(
            f"{option.opts[0]} does nothing with {use}, which takes {takes or 'no other option'}",
            field=option.opts[0],
        )


def _write(
    model: Path,
    out: Path,
    *,
    dtype: str,
    profiles: list[str],
    static: bool,
    layout: str,
    hoisted: bool,
    variant: str | None,
    tokenizer: Path | None,
) -> None:
    if dtype not in DTYPES:
        raise RequestError(f"--dtype is {shown(dtype)}; it must be {', '.join(DTYPES)}", field="--dtype")
    from ritocco.checkpoint import open_checkpoint
    from ritocco_export.exporter import export_checkpoint
    from ritocco_export.profiles import Profile

    sizes = [Profile.parse(text) for text in profiles]
    if is_artefacts(model):
        raise RequestError(f"--model is {model}, which holds exported graphs already", field="--model")
    checkpoint = open_checkpoint(model, variant=variant, tokenizer=tokenizer)
    try:
        export_checkpoint(
            checkpoint,
            out,
            dtype=DTYPES[dtype],
            layout=cast("Layout", layout),  # which it looks at
            profiles=sizes,
            static=static,
            hoisted=hoisted,
            say=lambda line: typer.echo(line, err=True),
        )
    except OSError as error:
        typer.echo(printable(f"error: {out}: {error}; nothing was kept{_left(out)}"), err=True)
        raise typer.Exit(1) from error
    _say_memory(out)


def _left(out: Path) -> str:
    """Of a disk, in words: what writes arrays does not tell why it failed."""
    from shutil import disk_usage

    there = next((one for one in (out.absolute(), *out.absolute().parents) if one.exists()), None)
    if there is None:
        return ""
    return f" ({disk_usage(there).free / 2**20:,.0f} MiB are free there)"


def _say_memory(out: Path) -> None:
    from ritocco.high_water import peak_bytes

    graphs = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if (peak := peak_bytes()) and graphs:
        written = f"{peak / graphs:.2f} times the {graphs / 2**20:.0f} MiB written"
        typer.echo(f"memory: {peak / 2**20:.0f} MiB at most, {written}", err=True)


def _build(
    graphs: Path, out: Path | None, *, library: str, targets: list[str], refit: bool, given: str | None
) -> None:
    from ritocco.artefacts import open_artefacts
    from ritocco.backends.engine_store import EngineOptions, options_in
    from ritocco_export.tensorrt_build import build_all

    if out is not None and out.resolve().is_relative_to(graphs.resolve()):
        rule = "in which engines would be strangers that its manifest refuses; name another folder"
        raise RequestError(f"--out lies in the export {shown(str(graphs))}, {rule}", field="--out")

    if library not in ("tensorrt", "tensorrt-rtx"):
        raise RequestError(
            f"--library is {shown(library)}; it must be tensorrt or tensorrt-rtx", field="--library"
        )
    options = EngineOptions.parse((options_in(given) or {}) | ({"refit": True} if refit else {}))
    try:
        for file in build_all(
            open_artefacts(graphs),
            library="tensorrt" if library == "tensorrt" else "tensorrt-rtx",
            options=options,
            targets=targets,
            folder=out,
            say=lambda line: typer.echo(line, err=True),
        ):
            typer.echo(file)
    except OSError as error:
        message = f"error: {out or 'the cache'}: {error}; what was built before is kept"
        typer.echo(printable(message), err=True)
        raise typer.Exit(1) from error


def _write_repository(out: Path, graphs: Path | None, instances: int, accelerator: str) -> None:
    from ritocco.artefacts import open_artefacts
    from ritocco_export.triton import ACCELERATORS, write_repository

    if graphs is None:
        raise RequestError("--triton needs --graphs, the folder of graphs to take", field="--graphs")
    if accelerator not in ACCELERATORS:
        rule = f"it must be {' or '.join(ACCELERATORS)}"
        raise RequestError(f"--accelerator is {shown(accelerator)}; {rule}", field="--accelerator")
    try:
        write_repository(open_artefacts(graphs), out, instances=instances, accelerator=accelerator)
    except OSError as error:
        typer.echo(printable(f"error: {out}: {error}; nothing was kept"), err=True)
        raise typer.Exit(1) from error
    typer.echo(out)


def _refuse_missing() -> None:
    if missing := [name for name in EXPORT_PACKAGES if not installed(name)]:
        raise BackendError(f'export needs {", ".join(missing)}; pip install "ritocco[{export_extra()}]"')


class Plugin:
    """See `ritocco.plugins.Exporter`."""

    def register(self, app: typer.Typer) -> None:
        """See `ritocco.plugins.Plugin`."""
        app.command("export")(command)

    def export(self, checkpoint: Checkpoint, out: Path, *, dtype: str, hoisted: bool, say: Say) -> None:
        """Write the checkpoint's graphs to `out`, for every size that a request can have."""
        _refuse_missing()
        from ritocco_export.exporter import export_checkpoint

        export_checkpoint(checkpoint, out, dtype=dtype, hoisted=hoisted, replace=True, say=say)

    def build_engine(
        self,
        artefacts: Artefacts,
        graph: GraphName,
        out: Path,
        *,
        library: Library,
        options: EngineOptions,
        target: str,
        timing: Path | None,
        say: Say,
    ) -> None:
        """See `ritocco.plugins.Exporter`."""
        from ritocco_export.tensorrt_build import build_engine

        build_engine(
            artefacts, graph, out, library=library, options=options, target=target, timing=timing, say=say
        )

    def structure(self, artefacts: Artefacts, graph: GraphName) -> str:
        """See `ritocco.plugins.Exporter`."""
        from ritocco_export.tensorrt_build import structure

        return structure(artefacts.graph(graph))

    def arenas(self, artefacts: Artefacts, asked: Mapping[GraphName, Sizes]) -> Mapping[GraphName, GraphPlan]:
        """See `ritocco.plugins.Exporter`."""
        if not installed("onnx"):
            raise BackendError('a plan of exported graphs needs onnx; pip install "ritocco[onnx]"')
        from ritocco_export.graph_memory import graph_plan

        return {
            graph: graph_plan(artefacts.graph(graph), artefacts.contract[graph], sizes)
            for graph, sizes in asked.items()
        }


PLUGIN = Plugin()
