"""`python -m ritocco_bench COMMAND`, or `ritocco bench COMMAND`.

startup, steps, both: ritocco against diffusers; turns: ritocco and its peers, request by request; backends:
ritocco's backends against each other; hoisted: plain graphs against hoisted ones; parity: a checkpoint's
pictures beside diffusers'; report: Markdown and plots of what was measured; make-folder: random weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ritocco.artefacts import open_artefacts
from ritocco.backends import SESSION_BACKENDS, installed
from ritocco.checkpoint import fingerprint, open_checkpoint
from ritocco.device import DTYPES, choose
from ritocco.errors import RitoccoError
from ritocco.loading import load, pocket_model
from ritocco_bench.asked import DIFFUSERS_CLASSES
from ritocco_bench.cases import Bench, backends, hoisted, startup, steps
from ritocco_bench.ceilings import ceilings
from ritocco_bench.environment import Environment, environment
from ritocco_bench.folder import SIZES, make_folder
from ritocco_bench.parity import ParityError, compare, gate
from ritocco_bench.parity_report import parity_report
from ritocco_bench.processes import BenchError, execute
from ritocco_bench.report import Row, append_rows, table
from ritocco_bench.rows import held
from ritocco_bench.summary import markdown, plots, read
from ritocco_bench.turns import turns
from ritocco_bench.variants import PAIR, VARIANTS
from ritocco_bench.worker import Job

WORK = Path(".cache/bench")
RESULTS = Path("benchmarks/results")
COMMANDS = ("startup", "steps", "both", "turns", "backends", "hoisted", "parity", "report", "make-folder")
ON_GRAPHS = ("backends", "hoisted")
RESUMED = ("steps", "turns")
_OF_A_ROW = ("case", "model", "device", "dtype", "variant")
LEAST_STEPS = 4
_PEERS = (
    *(name for name in VARIANTS if name != "ritocco"),
    *(f"ritocco-{name}" for name in SESSION_BACKENDS),
)
PEER = ("diffusers", "transformers")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m ritocco_bench") -> int:
    """Run a command line; `both` where it names no command.

    Returns the exit status: 1 where a package, a model or parity is missing, and then nothing is reported.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "both")
    arguments = _parser(prog).parse_args(words)
    try:
        if arguments.command == "make-folder":
            print(make_folder(arguments.out, arguments.size))
        elif arguments.command == "parity":
            return _compare(arguments)
        elif arguments.command == "report":
            _report(arguments)
        else:
            _measure(arguments)
    except (ParityError, BenchError, RitoccoError, OSError) as error:
        print(f"{type(error).__name__}: {error}\nNothing more is reported.", file=sys.stderr)
        return 1
    return 0


def _measure(arguments: argparse.Namespace) -> None:
    """The cases asked for: rows into the file, the table last."""
    on_graphs = arguments.command in ON_GRAPHS
    if not on_graphs:
        _refuse_without_peer()
    choice = choose(arguments.device, arguments.dtype)
    full = arguments.full or arguments.model is not None
    bench = Bench(
        model=_model(arguments),
        device=str(choice.device),
        # What `auto` is on graphs, each backend knows.
        dtype=arguments.dtype if on_graphs else str(choice.dtype).removeprefix("torch."),
        pairs=(5 if full or arguments.command == "startup" else 3)
        if arguments.pairs is None
        else arguments.pairs,
        size=_given(arguments.size, 512 if full or on_graphs else 128),
        steps=_given(arguments.steps, 25 if on_graphs else 4),
        outputs=arguments.outputs[0],
        runs=arguments.runs,
        warm=_given(arguments.warm, 3 if choice.device.type == "cuda" else 1),
        variants=_variants(arguments),
        backend=arguments.backend,
    )
    benches = [replace(bench, outputs=count) for count in arguments.outputs]
    if len(benches) > 1 and arguments.command != "turns":
        raise BenchError(f"--outputs has {len(benches)} numbers; {arguments.command} takes one")
    out = _out(arguments, full=full)
    _refuse_unwritable(out)
    env = environment(bench.device)
    if arguments.resume:
        benches = _left(benches, arguments.command, out, env)
        if not benches:
            return
        bench = benches[0]
    _say(f"{bench.model} on {env.machine}, {env.cores} cores; {choice.reasons[-1]}")
    if on_graphs:
        measure = _backends if arguments.command == "backends" else _hoisted
        _finish(arguments, measure(bench, env), full=full)
        return
    if not env.versions["accelerate"]:
        _say("accelerate is not installed: without it diffusers loads slower than it can")
    parity = gate(bench.job("ritocco"), execute)
    _say(f"parity: float32 error {parity.error:.1e}; {bench.dtype} {parity.psnr_db:.1f} dB")
    if arguments.command == "turns":
        for each in benches:
            _finish(arguments, turns(each, env, run=execute, say=_say), full=full)
        return
    rows = []
    if arguments.command in ("startup", "both"):
        rows += startup(bench, parity, env, run=execute, say=_say)
        _keep(out, rows)
    if arguments.command in ("steps", "both"):
        machine = ceilings(bench.device, bench.dtype)
        rows += steps(bench, env, machine=machine, keep=partial(_keep, out), run=execute, say=_say)
    print(table(rows))


def _left(benches: Sequence[Bench], command: str, out: Path, env: Environment) -> list[Bench]:
    """What a file does not hold of the same sources on such a machine: of turns whole requests, of steps the
    peers that are missing, beside ritocco again, so that what is compared is of one run.

    Raises BenchError for commands that can't go on.
    """
    if command not in RESUMED:
        raise BenchError(f"--resume is for {' and '.join(RESUMED)}; {command} starts anew")
    there = {tuple(row.get(name) for name in _OF_A_ROW) for row in held(out, env)}
    left = []
    for bench in benches:
        case = f"{command}-{bench.case}" if command == "turns" else bench.case
        missing = [
            name
            for name in bench.variants
            if (case, bench.model.name, bench.device, bench.held(name).dtype, name) not in there
        ]
        if not missing:
            _say(f"{case}: {', '.join(bench.variants)} are there")
        elif command == "turns":
            left.append(bench)
        else:
            left.append(replace(bench, variants=tuple(dict.fromkeys(("ritocco", *missing)))))
    return left


def _compare(arguments: argparse.Namespace) -> int:
    """The report of a checkpoint beside diffusers; 1 where a picture differs."""
    _refuse_without_peer()
    steps = arguments.steps or LEAST_STEPS
    if steps < LEAST_STEPS:
        rule = f"parity needs at least {LEAST_STEPS}, which diffusers' PNDM takes"
        raise BenchError(f"--steps is {steps}; {rule}")
    choice = choose(arguments.device, arguments.dtype)
    model, dtype = _model(arguments), str(choice.dtype).removeprefix("torch.")
    version = fingerprint(open_checkpoint(model))
    job = Job(
        variant="ritocco",
        model=str(model),
        device=str(choice.device),
        dtype=dtype,
        size=arguments.size or 256,
        steps=steps,
        schedulers=tuple(DIFFUSERS_CLASSES),
    )
    found = compare(job, execute)
    print(parity_report(found, job, environment(job.device), model=model.resolve().name, version=version))
    return int(any(one.problem is not None for one in found))


def _report(arguments: argparse.Namespace) -> None:
    """What the files hold, as Markdown on standard output; plots beside it."""
    rows, rungs, kernels = read(arguments.files)
    print(markdown(rows, rungs, kernels), end="")
    if arguments.plots is not None:
        for file in plots(rows, rungs, arguments.plots):
            _say(str(file))


def _refuse_without_peer() -> None:
    if missing := [name for name in PEER if not installed(name)]:
        raise BenchError(f"{' and '.join(missing)} not installed: pip install 'ritocco[bench]'")


def _finish(arguments: argparse.Namespace, rows: Sequence[Row], *, full: bool) -> None:
    _keep(_out(arguments, full=full), rows)
    print(table(rows))


def _keep(out: Path, rows: Sequence[Row]) -> None:
    append_rows(out, rows)
    _say(f"{len(rows)} rows added to {out}")


def _out(arguments: argparse.Namespace, *, full: bool) -> Path:
    name = f"{arguments.command}.jsonl"
    return Path(arguments.out or (RESULTS / name if full else WORK / name))


def _refuse_unwritable(out: Path) -> None:
    """Before the work. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", encoding="utf-8"):
        pass
    if new:
        out.unlink()


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _backends(bench: Bench, env: Environment) -> list[Row]:
    """Export the model into the cache, then measure torch and what else is installed."""
    names = _session_backends()
    load(bench.model, backend=names[0])
    dtype = str(choose(bench.device).dtype).removeprefix("torch.")
    peer = dtype if all(installed(name) for name in PEER) else None
    return backends(bench, names, env, peer_dtype=peer, run=execute, say=_say)


def _hoisted(bench: Bench, env: Environment) -> list[Row]:
    """Export the model both ways for its size, then measure the two on every backend that is installed."""
    names = _session_backends()
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if not installed(name)]:
        raise BenchError(f"{' and '.join(missing)} not installed: pip install 'ritocco[onnx]'")
    from ritocco_export.exporter import export_checkpoint
    from ritocco_export.profiles import Profile

    checkpoint = open_checkpoint(bench.model)
    profile = Profile.parse(f"{bench.size}@1..{bench.outputs}")
    folders = {kind: WORK / f"graphs-{bench.size}-{kind}" for kind in ("plain", "hoisted")}
    for kind, folder in folders.items():
        try:
            opened = open_artefacts(folder, version=fingerprint(checkpoint))
            # Kept from another run, for at least as many pictures.
            if opened.contract["vae_decoder"].ranges["N"][2] >= bench.outputs:
                continue
        except RitoccoError:
            pass
        export_checkpoint(checkpoint, folder, profiles=[profile], hoisted=kind == "hoisted", say=_say)
    return hoisted(bench, folders, names, env, run=execute, say=_say)


def _session_backends() -> list[str]:
    names = [name for name in SESSION_BACKENDS if installed(name)]
    if not names:
        raise BenchError("no backend is installed: pip install 'ritocco[onnx]' 'ritocco[openvino]'")
    return names


def _model(arguments: argparse.Namespace) -> Path:
    """The folder asked for, else the full-size one (made once), else the embedded model, else a tiny one."""
    if arguments.model is not None:
        return Path(arguments.model)
    if arguments.full:
        return make_folder(WORK / "full", "full")
    embedded = pocket_model()
    return embedded if (embedded / "model_index.json").is_file() else make_folder(WORK / "tiny", "tiny")


def _variants(arguments: argparse.Namespace) -> tuple[str, ...]:
    """ritocco and its peers; diffusers is always one but in turns, which hold all of them in memory at once.

    Raises BenchError for one that is unknown, or whose packages are missing.
    """
    names = tuple(filter(None, arguments.peers.split(",")))
    for name in names:
        if name not in _PEERS:
            raise BenchError(f"--peers has {name!r}; it takes {', '.join(_PEERS)}")
        needs = VARIANTS[name].needs if name in VARIANTS else ()
        if missing := [package for package in needs if not installed(package)]:
            raise BenchError(f"--peers has {name}, and {' and '.join(missing)} is not installed")
    if arguments.command == "turns":
        return tuple(dict.fromkeys(("ritocco", *(names or ("diffusers",)))))
    return tuple(dict.fromkeys((*PAIR, *names)))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make-folder", help="write a model folder of seeded random weights")
    made.add_argument("--out", type=Path, required=True, help="the folder")
    made.add_argument("--size", choices=tuple(SIZES), default="full", help="of the networks")
    told = commands.add_parser("report", help="Markdown, and plots, of rows that were measured")
    told.add_argument("files", type=Path, nargs="+", help="JSONL files, as in benchmarks/results/")
    told.add_argument("--plots", type=Path, help="a folder for a PNG of each run")
    for name, text in (
        ("startup", "fresh process to the first UNet step"),
        ("steps", "seconds of each phase, and peak memory"),
        ("both", "one after the other; the default"),
        ("turns", "a request of ritocco and of each of --peers in turns, --pairs times"),
        ("hoisted", "a picture on plain and on hoisted graphs, on each exported backend"),
        ("parity", "a checkpoint beside diffusers with every scheduler: a report to paste"),
        ("backends", "fresh process to its first picture: torch, exported graphs, diffusers"),
    ):
        case = commands.add_parser(name, help=text)
        case.add_argument("--model", help="diffusers folder; default: the embedded model, else a tiny one")
        case.add_argument("--full", action="store_true", help="a full-size random folder, made once (2.6 GB)")
        case.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        case.add_argument(
            "--dtype", default="auto", choices=("auto", *DTYPES), help="of weights and arithmetic"
        )
        case.add_argument("--pairs", type=int, help="processes of each variant, or turns; default 5, quick 3")
        case.add_argument("--size", type=int, help="pixels per side; default 512, quick steps 128")
        case.add_argument("--steps", type=int, help="default 4; on graphs 25")
        case.add_argument(
            "--outputs",
            type=_numbers,
            default=(1,),
            help="pictures of a request; turns take 1,2,4; default 1",
        )
        case.add_argument("--runs", type=int, default=1, help="for steps: measured requests of each process")
        case.add_argument("--warm", type=int, help="requests before what is measured; default 1, on CUDA 3")
        case.add_argument("--peers", default="", help=f"steps, turns; with commas: {', '.join(_PEERS)}")
        case.add_argument("--backend", default="torch", help="steps, turns: of ritocco; default %(default)s")
        case.add_argument("--out", type=Path, help="JSONL file; default benchmarks/results/, quick .cache/")
        case.add_argument(
            "--resume",
            action="store_true",
            help="steps, turns: leave out what the file has from these sources and machine",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
