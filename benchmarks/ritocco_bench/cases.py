"""The cases: ritocco against diffusers, each run in a fresh process, in turns, behind the parity gate."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ritocco.backends import SESSION_BACKENDS
from ritocco.checkpoint import open_checkpoint
from ritocco_bench.asked import PHASES
from ritocco_bench.ceilings import Ceilings
from ritocco_bench.environment import Environment
from ritocco_bench.flops import flops
from ritocco_bench.painted import Painted
from ritocco_bench.parity import Execute, Parity, distance, refuse_further
from ritocco_bench.processes import BenchError, execute
from ritocco_bench.report import Row
from ritocco_bench.variants import PAIR, VARIANTS
from ritocco_bench.worker import Job

Say = Callable[[str], None]

STARTUP_SIZE = 64
_COUNT = (1, 100_000)
LEAST_PSNR_DB = 25.0  # of decoded floats: bfloat16 beside float32 after a whole schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, where, how often.

    pairs: processes of each variant. runs: measured requests in each, after `warm` others. variants: beside
    each other, ritocco first: names of VARIANTS, or `ritocco-` and a backend. backend: of `ritocco` itself.
    """

    model: Path
    device: str
    dtype: str
    pairs: int
    size: int
    steps: int
    outputs: int = 1
    runs: int = 1
    warm: int = 1
    variants: tuple[str, ...] = PAIR
    backend: str = "torch"

    def __post_init__(self) -> None:
        bounds = {"steps": (1, 500), "outputs": (1, 4), "size": (64, 1024)}
        for name, (least, most) in {"pairs": _COUNT, "runs": _COUNT, "warm": _COUNT, **bounds}.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise BenchError(f"{name} is {value}; it must be {least} to {most}")
        if self.size % 64:
            raise BenchError(f"size is {self.size}; it must be a multiple of 64")
        for name in self.variants:
            if name not in VARIANTS and name.removeprefix("ritocco-") not in SESSION_BACKENDS:
                known = (*VARIANTS, *(f"ritocco-{backend}" for backend in SESSION_BACKENDS))
                raise BenchError(f"{name} is no variant; known are {', '.join(known)}")
            self._refuse_untaken(name)

    @property
    def case(self) -> str:
        """Size, steps and outputs, as rows name them."""
        return f"{self.size}x{self.size}-{self.steps}steps-{self.outputs}x"

    def _refuse_untaken(self, name: str) -> None:
        takes = VARIANTS.get(name)
        if takes is None:
            return
        if takes.devices and self.device not in takes.devices:
            raise BenchError(f"device is {self.device}; {name} takes {' or '.join(takes.devices)}")
        dtype = takes.dtype or self.dtype
        if takes.dtypes and dtype not in (*takes.dtypes, "auto"):
            raise BenchError(f"dtype is {dtype}; {name} takes {' or '.join(takes.dtypes)}")

    def job(self, variant: str) -> Job:
        """The measured job of one variant."""
        backend = variant.removeprefix("ritocco-") if variant not in VARIANTS else self.backend
        return Job(
            variant=variant if variant in VARIANTS else "ritocco",
            backend=backend,
            model=str(self.model),
            device=self.device,
            dtype=self.held(variant).dtype,
            size=self.size,
            steps=self.steps,
            outputs=self.outputs,
            runs=self.runs,
            warm=self.warm,
        )

    def held(self, variant: str) -> Bench:
        """With the dtype that a variant computes in."""
        on_onnxruntime = variant == "ritocco-onnxruntime" or (variant, self.backend) == (
            "ritocco",
            "onnxruntime",
        )
        if on_onnxruntime and self.device == "cpu" and self.dtype != "auto":
            return replace(self, dtype="float32")  # all that it has there
        return replace(self, dtype=(VARIANTS[variant].dtype if variant in VARIANTS else "") or self.dtype)


def startup(
    bench: Bench, parity: Parity, env: Environment, *, run: Execute = execute, say: Say = print
) -> list[Row]:
    """Fresh process to loaded networks, and to the end of the first UNet step; page cache warm.

    The request is the smallest, one step at 64 x 64 pixels, so that loading is what is measured: tokens, text
    encoder, VAE encoder and one guided UNet evaluation, then the process ends. The processes take turns,
    ritocco first. parity: of `gate`. Raises BenchError.
    """
    warm_page_cache(bench.model)
    small = replace(bench, size=STARTUP_SIZE, steps=1, outputs=1)
    taken: dict[tuple[str, str], list[float]] = {}
    for pair in range(bench.pairs):
        for variant in PAIR:
            result, started = run(replace(small.job(variant), until="first_step"))
            taken.setdefault((variant, "load"), []).append(result.loaded - started)
            taken.setdefault((variant, "first_step"), []).append(result.stepped - started)
            say(f"startup {pair + 1}/{bench.pairs} {variant}: {result.stepped - started:.2f} s")
    case = f"startup-{small.size}x{small.size}"
    return [row_of(case, small, key, seconds, None, parity, env) for key, seconds in taken.items()]


def steps(
    bench: Bench,
    env: Environment,
    *,
    machine: Ceilings,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    run: Execute = execute,
    say: Say = print,
) -> list[Row]:
    """Every variant on the same weights: start, first picture, seconds and peak of each phase after that.

    The processes take turns, ritocco first. Before them diffusers paints the measured request in float32, and
    what each process paints last must lie within LEAST_PSNR_DB of that, and what ritocco does also as
    `refuse_worse_than_peers` has it. `step` is the loop's mean. machine: what the device can do, for rows.
    keep: given a variant's rows as soon as they are complete, ritocco's when it was held beside a peer.
    Raises ParityError and BenchError.
    """
    work = flops(open_checkpoint(bench.model), size=bench.size, outputs=bench.outputs)
    work["denoise"] = bench.steps * work["step"]
    taken: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    found: dict[str, Parity] = {}
    waiting: list[str] = []
    rows: list[Row] = []

    def made(key: tuple[str, str]) -> Row:
        row = row_of(
            bench.case, bench.held(key[0]), key, taken[key], peaks.get(key) or None, found[key[0]], env
        )
        if key[1] in work:
            row = replace(row, flop=work[key[1]], matmul_flop_per_s=machine.matmul_flop_per_s)
        return replace(row, copy_bytes_per_s=machine.copy_bytes_per_s)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "painted.npz"
        exact = replace(bench.job("diffusers-float32"), until="picture", warm=0, runs=1, painted=str(file))
        run(exact)
        truth = Painted.read(file)
        for variant in bench.variants:
            if variant not in VARIANTS or not VARIANTS[variant].timed_start:
                say(f"steps {variant}: its graphs are made, where they are not there")
                run(replace(bench.job(variant), until="loaded"))
        for pair in range(bench.pairs):
            for variant in bench.variants:
                job = replace(bench.job(variant), until="picture", painted=str(file), peaks=pair == 0)
                result, started = run(job)
                found[variant] = distance(Painted.read(file), truth, least_db=LEAST_PSNR_DB, name=variant)
                if variant not in VARIANTS or VARIANTS[variant].timed_start:
                    taken.setdefault((variant, "load"), []).append(result.loaded - started)
                    taken.setdefault((variant, "first_picture"), []).append(result.stepped - started)
                for seconds in result.seconds:
                    held = {**seconds, "step": seconds["denoise"] / bench.steps}
                    held["total"] = total(seconds)
                    for phase, one in held.items():
                        taken.setdefault((variant, phase), []).append(one)
                for phase, most in {**result.peaks, "total": result.peak_bytes or 0}.items():
                    peaks[variant, phase] = max(peaks.get((variant, phase), 0), most)
                say(f"steps {pair + 1}/{bench.pairs} {variant}: {taken[variant, 'total'][-1]:.2f} s")
                refuse_worse_than_peers(bench, found)
                if pair < bench.pairs - 1:
                    continue
                waiting.append(variant)
                for name in [one for one in waiting if _judged(bench, one, found)]:
                    waiting.remove(name)
                    rows += (complete := [made(key) for key in taken if key[0] == name])
                    keep(complete)
    return rows


def refuse_worse_than_peers(bench: Bench, found: Mapping[str, Parity]) -> None:
    """Hold ritocco's variants beside those of diffusers that compute in the same dtype, unless it is float32.

    Raises ParityError where one lies more than twice as far from the float32 truth.
    """
    for name in found:
        for peer in _like_peers(bench, name):
            if peer in found:
                refuse_further(found[name], found[peer], name=name, peer=peer)


def _like_peers(bench: Bench, name: str) -> list[str]:
    dtype = bench.held(name).dtype
    if dtype == "float32" or not name.startswith("ritocco"):
        return []
    theirs = [peer for peer in bench.variants if peer.startswith("diffusers")]
    return [peer for peer in theirs if bench.held(peer).dtype == dtype]


def _judged(bench: Bench, name: str, found: Mapping[str, Parity]) -> bool:
    """Whether a variant has been held beside a peer, where there is one."""
    peers = _like_peers(bench, name)
    return not peers or any(peer in found for peer in peers)


def backends(
    bench: Bench,
    names: Sequence[str],
    env: Environment,
    *,
    peer_dtype: str | None,
    run: Execute = execute,
    say: Say = print,
) -> list[Row]:
    """Fresh process to its first picture, and a picture after that: torch, each named backend, diffusers.

    The graphs must be in the cache. The processes take turns, torch first; the first pair fills caches of
    compiled models and is not counted. Each computes in the dtype that it takes by itself; diffusers in
    `peer_dtype`, and not at all where that is None. Every picture must lie within LEAST_PSNR_DB of torch's in
    float32. Raises ParityError and BenchError.
    """
    bench = replace(bench, dtype="auto")
    taken: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, int | None] = {}
    found: dict[str, Parity] = {}
    jobs = {"ritocco": bench.job("ritocco")}
    jobs |= {f"ritocco-{name}": replace(jobs["ritocco"], backend=name) for name in names}
    if peer_dtype is not None:
        jobs["diffusers"] = replace(bench.job("diffusers"), dtype=peer_dtype)
    with tempfile.TemporaryDirectory() as folder:
        truth_file = Path(folder) / "truth.npz"
        run(replace(bench.job("ritocco"), dtype="float32", runs=0, until="picture", painted=str(truth_file)))
        truth = Painted.read(truth_file)
        for pair in range(bench.pairs + 1):
            for variant, job in jobs.items():
                file = Path(folder) / f"{variant}.npz"
                result, started = run(replace(job, until="picture", painted=str(file)))
                found[variant] = distance(Painted.read(file), truth, least_db=LEAST_PSNR_DB, name=variant)
                peaks[variant] = max(peaks.get(variant) or 0, result.peak_bytes or 0) or None
                if pair:
                    taken.setdefault((variant, "load"), []).append(result.loaded - started)
                    taken.setdefault((variant, "first_picture"), []).append(result.stepped - started)
                    taken.setdefault((variant, "total"), []).append(total(result.seconds[-1]))
                say(f"backends {pair}/{bench.pairs} {variant}: {result.stepped - started:.2f} s")
    case = f"backends-{bench.size}x{bench.size}-{bench.steps}steps"
    rows = []
    for key, seconds in taken.items():
        held, peak = replace(bench, dtype=jobs[key[0]].dtype), peaks[key[0]] if key[1] == "total" else None
        rows.append(row_of(case, held, key, seconds, peak, found[key[0]], env))
    return rows


def hoisted(
    bench: Bench,
    graphs: Mapping[str, Path],
    names: Sequence[str],
    env: Environment,
    *,
    run: Execute = execute,
    say: Say = print,
) -> list[Row]:
    """A picture on plain and on hoisted graphs, on each named backend: the processes take turns.

    graphs: `plain` and `hoisted` -> folder. Each process paints once before what is measured, and computes in
    the bench's dtype. Every picture must lie within LEAST_PSNR_DB of torch's in float32. Raises ParityError
    and BenchError.
    """
    taken: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, int | None] = {}
    found: dict[str, Parity] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "painted.npz"

        job = replace(bench.job("ritocco"), until="picture", painted=str(file))
        run(replace(job, dtype="float32", runs=0))
        truth = Painted.read(file)
        for pair in range(bench.pairs):
            for name in names:
                for kind in graphs:
                    variant = f"{name}-{kind}"
                    result, _ = run(replace(job, model=str(graphs[kind]), backend=name))
                    found[variant] = distance(Painted.read(file), truth, least_db=LEAST_PSNR_DB, name=variant)
                    peaks[variant] = max(peaks.get(variant) or 0, result.peak_bytes or 0) or None
                    seconds = result.seconds[-1]
                    taken.setdefault((variant, "denoise"), []).append(seconds["denoise"])
                    taken.setdefault((variant, "total"), []).append(total(seconds))
                    say(f"hoisted {pair + 1}/{bench.pairs} {variant}: denoise {seconds['denoise']:.2f} s")
    case = f"hoisted-{bench.case}"
    return [
        row_of(case, bench, key, seconds, peaks[key[0]] if key[1] == "total" else None, found[key[0]], env)
        for key, seconds in taken.items()
    ]


def total(seconds: Mapping[str, float]) -> float:
    """Of the phases of a run, which are not all that it has seconds of."""
    return math.fsum(seconds[phase] for phase in PHASES)


def warm_page_cache(folder: Path) -> None:
    """Read every file once."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            while stream.read(1 << 22):
                pass


def row_of(
    case: str,
    bench: Bench,
    key: tuple[str, str],
    seconds: Sequence[float],
    peak: int | None,
    parity: Parity,
    env: Environment,
) -> Row:
    """key: variant and phase. seconds: in the order that they were taken in. peak: in bytes."""
    each = tuple(round(1000 * one, 3) for one in seconds)
    p20, p50, p80 = np.quantile(each, (0.2, 0.5, 0.8)).round(3).tolist()
    return Row(
        case=case,
        model=bench.model.name,
        device=bench.device,
        dtype=bench.dtype,
        variant=key[0],
        phase=key[1],
        p20_ms=p20,
        p50_ms=p50,
        p80_ms=p80,
        samples=len(each),
        each_ms=each,
        peak_bytes=peak,
        parity_error=parity.error,
        parity_psnr_db=parity.psnr_db,
        environment=env,
    )
