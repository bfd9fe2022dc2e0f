"""The benchmark harness: the folder it makes, the gate, the rows, the command line. No time is judged."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from made_rows import in_process, row
from ritocco.checkpoint import load_tokenizer, open_checkpoint
from ritocco.errors import CheckpointError
from ritocco.parameters import build
from ritocco.pixels import from_model
from ritocco_bench import __main__ as command
from ritocco_bench import (
    asked,
    cases,
    ceilings,
    environment,
    flops,
    folder,
    painted,
    parity,
    peaks,
    processes,
    report,
    their_graphs,
    theirs,
    turns,
    variants,
    worker,
)

PASSED = parity.Parity(error=2e-6, psnr_db=80.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder of random weights."""
    return folder.make_folder(tmp_path_factory.mktemp("bench") / "tiny", "tiny")


def bench(model: Path, *, dtype: str = "float32", pairs: int = 1) -> cases.Bench:
    """A bench that is quick on any machine."""
    return cases.Bench(model=model, device="cpu", dtype=dtype, pairs=pairs, size=64, steps=2)


def quiet(line: str) -> None:
    """Progress that nobody reads."""


def repaint(file: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
    """Other floats than those that were decoded, and the pictures of them."""
    decoded = change(painted.Painted.read(file).decoded)
    painted_of(decoded).write(file)


def painted_of(decoded: npt.NDArray[Any]) -> painted.Painted:
    """Pictures of floats [R,N,3,H,W]."""
    pictures = np.stack([from_model(one) for one in decoded])
    return painted.Painted(decoded=decoded, pictures=pictures)


def test_folder_is_the_same_every_time_and_complete(tiny: Path, tmp_path: Path) -> None:
    again = folder.make_folder(tmp_path / "again", "tiny")
    files = sorted(path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((tiny / name).read_bytes() == (again / name).read_bytes() for name in files)
    with pytest.raises(ValueError, match="size is 'huge'"):
        folder.make_folder(tmp_path / "huge", "huge")


def test_folder_is_never_mixed_with_another(tiny: Path) -> None:
    assert folder.make_folder(tiny, "tiny") == tiny
    with pytest.raises(CheckpointError, match="holds another model"):
        folder.make_folder(tiny, "full")


def test_folder_opens_as_a_checkpoint_in_float16(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    stored = {tensor.dtype for variants in checkpoint.weights.values() for tensor in variants[""].values()}
    assert stored == {"F16"}
    assert load_tokenizer(checkpoint).vocab_size == checkpoint.text_encoder["vocab_size"]


def test_full_folder_has_the_published_parameter_counts() -> None:
    counts = {
        network: sum(tensor.numel() for tensor in build(network, config).state_dict().values())
        for network, config in folder.SIZES["full"].items()
    }
    assert counts == {"unet": 865_925_124, "vae": 83_653_863, "text_encoder": 340_387_840}


def test_rows_survive_the_file(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rows.jsonl"
    rows = [row("ritocco"), row("diffusers", "text")]
    report.append_rows(file, rows[:1])
    report.append_rows(file, rows[1:])
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [report.Row.from_json(line) for line in lines] == rows
    held = json.loads(lines[0])
    assert held["environment"]["versions"]["torch"]
    assert held["environment"]["machine"]
    del held["p50_ms"]
    with pytest.raises(ValueError, match="p50_ms"):
        report.Row.from_json(json.dumps(held))


def test_rows_of_older_versions_are_read() -> None:
    held = json.loads(row("ritocco").to_json())
    for name in ("sources", "power_limit_w", "sm_clock_mhz", "memory_clock_mhz"):
        del held["environment"][name]
    assert report.Row.from_json(json.dumps(held)).environment.sm_clock_mhz is None


@pytest.mark.parametrize(
    ("told", "held"),
    [
        ("580.159.04, 700.00, 1980, 3201", ("580.159.04", 700.0, 1980.0, 3201.0)),
        ("580.159.04, [N/A], 345, [N/A]", ("580.159.04", None, 345.0, None)),
        ("", ("", None, None, None)),
    ],
)
def test_a_cards_clocks_are_told_as_they_are_found(
    told: str, held: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_output", lambda *command: told)
    assert environment._nvidia(0) == held
    assert environment.environment("cpu").power_limit_w is None


def test_sources_are_known_by_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed or not: a kernel that was broken for a try is not the one that was measured."""
    here = environment.environment("cpu").sources
    assert len(here) == 12
    assert here == environment.environment("cpu").sources
    monkeypatch.setattr(environment, "SOURCES", ("package",))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package" / "inner").mkdir(parents=True)
    found = set()
    for name, text in (("__init__.py", ""), ("inner/a.py", "1"), ("inner/a.py", "2"), ("b.py", "2")):
        (tmp_path / "package" / name).write_text(text, encoding="utf-8")
        found.add(environment._sources())
    assert len(found) == 4


def test_ratios_are_taken_pair_by_pair() -> None:
    ours, theirs = row("ritocco"), row("diffusers", each=(30.0, 80.0, 80.0))
    assert report.ratios(ours, theirs) == [3.0, 4.0, 2.0]
    last = report.table([ours, theirs]).splitlines()[-1]
    assert last == "64x64 total: diffusers / ritocco 3.00 (2.00 to 4.00; pairs 3.00 4.00 2.00)"
    with pytest.raises(ValueError, match="zip"):
        report.ratios(ours, row("diffusers", each=(30.0, 80.0)))


def test_quantiles_of_a_row(tiny: Path) -> None:
    seconds = iter([0.004, 0.001, 0.002, 0.003, 0.005])

    def run(job: worker.Job) -> tuple[worker.Result, float]:
        taken = next(seconds) if job.variant == "ritocco" else 1.0
        return worker.Result(loaded=100.0 + taken, stepped=100.0 + 2 * taken), 100.0

    rows = cases.startup(bench(tiny, pairs=5), PASSED, environment.environment("cpu"), run=run, say=quiet)
    ours = next(one for one in rows if (one.variant, one.phase) == ("ritocco", "load"))
    assert ours.each_ms == (4.0, 1.0, 2.0, 3.0, 5.0)
    assert (ours.p20_ms, ours.p50_ms, ours.p80_ms, ours.samples) == (1.8, 3.0, 4.2, 5)
    assert (ours.parity_error, ours.parity_psnr_db) == (PASSED.error, PASSED.psnr_db)


@pytest.mark.slow
def test_startup_in_fresh_processes(tiny: Path) -> None:
    rows = cases.startup(bench(tiny), PASSED, environment.environment("cpu"), say=quiet)
    taken = {(one.variant, one.phase): one.each_ms[0] for one in rows}
    assert set(taken) == {(v, p) for v in ("ritocco", "diffusers") for p in ("load", "first_step")}
    assert all(0 < taken[variant, "load"] < taken[variant, "first_step"] for variant in variants.PAIR)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    job = bench(tmp_path / "nothing").job("ritocco")
    with pytest.raises(processes.BenchError, match=r"(?s)ritocco: exit status 1.*no such file or folder"):
        processes.execute(job)


def test_steps_prints_a_table_behind_a_green_gate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "execute", in_process)
    monkeypatch.setattr(ceilings, "ON_CPU", (32, 4096))
    out = tmp_path / "rows.jsonl"
    words = ["--model", str(tiny), "--dtype", "float32", "--pairs", "2", "--size", "64", "--steps", "2"]
    assert command.main(["steps", *words, "--outputs", "2", "--out", str(out)]) == 0
    rows = [report.Row.from_json(line) for line in out.read_text(encoding="utf-8").splitlines()]
    phases = ("load", "first_picture", *asked.PHASES, "png", "whole", "step", "total")
    assert [(one.variant, one.phase) for one in rows] == [(v, p) for v in variants.PAIR for p in phases]
    assert all(one.samples == 2 and min(one.each_ms) > 0 for one in rows)
    assert all(one.parity_psnr_db >= cases.LEAST_PSNR_DB for one in rows)
    for one in rows:
        assert (one.flop is not None) == (one.phase in ("step", "encode", "denoise", "decode"))
        assert (one.flop_per_s is not None) == (one.flop is not None)
        assert one.copy_bytes_per_s is not None
        assert (one.peak_bytes is not None) == (one.phase in (*asked.PHASES, "total"))
    assert {one.case for one in rows} == {"64x64-2steps-2x"}
    assert "diffusers / ritocco" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        (
            "diffusers-jax",
            "--peers has 'diffusers-jax'; it takes diffusers, diffusers-float32, ",
        ),
        ("ritocco-torch", "--peers has 'ritocco-torch'"),
        ("diffusers-openvino", "--peers has diffusers-openvino, and openvino is not installed"),
    ],
)
def test_peers_that_can_not_be_measured(
    peers: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "installed", lambda package: package != "openvino")
    assert command.main(["steps", "--peers", peers]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("pairs", -1, "1 to"),
        ("runs", 0, "1 to"),
        ("warm", -1, "1 to"),
        ("steps", 0, "1 to 500"),
        ("outputs", 9, "1 to 4"),
        ("size", 0, "64 to 1024"),
        ("size", 100, "a multiple of 64"),
    ],
)
def test_what_can_not_be_measured_is_refused_first(
    option: str, value: int, rule: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["steps", "--model", str(tiny), f"--{option}", str(value), "--out", str(out)]
    assert command.main(words) == 1
    assert f"BenchError: {option} is {value}; it must be {rule}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        ("cuda:0", "bfloat16", "device is cuda:0; diffusers-openvino takes cpu"),
        ("cpu", "float16", "dtype is float16; diffusers-openvino takes bfloat16 or float32"),
    ],
)
def test_what_a_peer_does_not_take_is_said_before_anything_runs(device: str, dtype: str, said: str) -> None:
    held = bench(Path("model"))
    with pytest.raises(processes.BenchError, match=said):
        replace(held, device=device, dtype=dtype, variants=("ritocco", "diffusers-openvino"))


def test_peers_graphs_are_exported_on_the_jobs_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, set[str]] = {}

    class Graphs(their_graphs.GraphDiffusers):
        def _export(self, module: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
            found[file.name] = {one.device.type for one in inputs}
            file.write_bytes(b"")

        def _open(self, file: Path) -> Any:
            return None

    monkeypatch.setattr(their_graphs, "GRAPHS", tmp_path)
    made = object.__new__(Graphs)
    made._job = replace(bench(tmp_path).job("ritocco"), device="meta")
    unet: Any = nn.Module()
    vae: Any = nn.Module()
    unet.config = SimpleNamespace(cross_attention_dim=8, in_channels=9)
    vae.config = SimpleNamespace(latent_channels=4)
    vae.encoder, vae.decoder = nn.Identity(), nn.Identity()
    made._prepare(SimpleNamespace(unet=unet, vae=vae))
    assert found == {f"{name}.onnx": {"meta"} for name in ("unet", "encoder", "decoder")}


def test_a_file_that_can_not_be_written_is_refused_first(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / "rows.jsonl"
    assert command.main(["steps", "--model", str(tiny), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "Nothing more is reported" in said
    assert "parity" not in said


def test_rows_say_what_a_variant_computes_in(tiny: Path) -> None:
    held = bench(tiny, dtype="bfloat16")
    assert held.job("ritocco").dtype == held.job("diffusers-openvino").dtype == "bfloat16"
    for name in ("diffusers-onnxruntime", "ritocco-onnxruntime", "diffusers-float32"):
        assert held.held(name).dtype == held.job(name).dtype == "float32"
    held = replace(held, backend="onnxruntime")
    assert (held.job("ritocco").dtype, held.job("diffusers").dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    "peer",
    [
        "diffusers-float32",
        pytest.param("diffusers-openvino", marks=pytest.mark.slow),
        pytest.param("diffusers-onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_peers_paint_the_same_picture(
    peer: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on the graphs that it makes of diffusers' networks; and one that paints another is found out."""
    pytest.importorskip(peer.partition("-")[2].replace("float32", "torch"))
    monkeypatch.chdir(tmp_path)
    held = replace(bench(tiny), variants=("ritocco", peer))
    off = 0.0

    def run(job: worker.Job) -> tuple[worker.Result, float]:
        result = in_process(job)
        if job.variant == peer and job.peaks:
            repaint(job.painted, lambda decoded: decoded + off)
        return result

    machine = ceilings.Ceilings(matmul_flop_per_s=2e12, copy_bytes_per_s=1e10)
    env = environment.environment("cpu")
    rows = cases.steps(held, env, machine=machine, run=run, say=quiet)
    theirs = {one.phase: one for one in rows if one.variant == peer}
    assert ("load" in theirs) == (peer == "diffusers-float32"), "a start with graphs is no user's"
    assert theirs["step"].parity_psnr_db > 60
    assert theirs["step"].matmul_flop_per_s == 2e12
    off = 0.5
    with pytest.raises(parity.ParityError, match=rf"{peer}: .* dB"):
        cases.steps(held, env, machine=machine, run=run, say=quiet)


def test_a_folder_of_fp16_files_alone_is_measured(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "fp16"
    shutil.copytree(tiny, model)
    for file in model.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert theirs.variant_of(model, torch.float32) == "fp16"
    assert parity.gate(bench(model).job("ritocco"), in_process).error <= parity.LARGEST_ERROR
    (model / "vae/diffusion_pytorch_model.fp16.safetensors").rename(
        model / "vae/diffusion_pytorch_model.safetensors"
    )
    assert theirs.variant_of(model, torch.float32) == "fp16", "of one network"
    assert theirs.variant_of(tiny, torch.float32) is None


@pytest.mark.filterwarnings("ignore")  # what diffusers warns of
def test_no_copy_for_the_gate_is_in_a_peers_time(tiny: Path, tmp_path: Path) -> None:
    made = theirs.Diffusers(replace(bench(tiny).job("diffusers"), painted=str(tmp_path / "painted.npz")))
    postprocess = made._pipe.image_processor.postprocess
    copied = []

    def last(*inputs: Any, **named: Any) -> Any:
        copied.append(made.decoded is not None)
        return postprocess(*inputs, **named)

    made._pipe.image_processor.postprocess = last
    made.run(1, lambda: None)
    assert copied == [False], "the pipeline's last work comes before the copy"
    assert made.decoded is not None
    assert made.pictures is not None
    assert (made.decoded.shape, made.pictures.shape) == ((1, 3, 64, 64), (1, 64, 64, 3))


class InTurns:
    """`processes.Process` in this process: a run is done when its turn comes."""

    log: list[str]
    off = 0.0  # added to what is painted

    def __init__(self, job: worker.Job) -> None:
        self._job, self._seconds = job, list[dict[str, float]]()

    def __enter__(self) -> InTurns:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ready(self) -> None:
        self.log.append(f"{self._job.variant} is ready")

    def go(self) -> None:
        if len(self._seconds) < self._job.runs:
            self.log.append(self._job.variant)
            alone = in_process(replace(self._job, turns=None, runs=1, warm=0))[0]
            self._seconds += alone.seconds
            repaint(self._job.painted, lambda decoded: decoded + self.off)

    def result(self) -> worker.Result:
        return worker.Result(loaded=0.0, seconds=self._seconds)


def test_requests_take_turns(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InTurns, "log", [], raising=False)
    held = replace(bench(tiny, pairs=2), variants=("ritocco", "diffusers-float32"))
    env = environment.environment("cpu")
    rows = turns.turns(held, env, hold=InTurns, run=in_process, say=quiet)
    both = [word for name in held.variants for word in (name, f"{name} is ready")]
    assert InTurns.log == [*both[1::2], *both, *both]
    phases = (*asked.PHASES, "png", "whole", "step", "total")
    assert [(one.variant, one.phase) for one in rows] == [(v, p) for v in held.variants for p in phases]
    assert all(one.samples == 2 and one.parity_psnr_db > 60 for one in rows)
    monkeypatch.setattr(InTurns, "off", 0.5)
    with pytest.raises(parity.ParityError, match=r"ritocco: .* dB"):
        turns.turns(held, env, hold=InTurns, run=in_process, say=quiet)


def test_a_process_waits_for_its_turns(tiny: Path, tmp_path: Path) -> None:
    job = replace(bench(tiny).job("ritocco"), until="picture", runs=2, turns=0, warm=0)
    with processes.Process(replace(job, painted=str(tmp_path / "painted.npz"))) as process:
        for _ in range(2):
            process.ready()
            process.go()
        process.ready()
        assert not (tmp_path / "painted.npz").exists()
        process.go()
        assert len(process.result().seconds) == 2
    assert (tmp_path / "painted.npz").exists()
    with processes.Process(job) as process:
        process.ready()
        process._process.kill()
        process._process.wait()
        with pytest.raises(processes.BenchError, match="ritocco: exit status -9"):
            process.go()
    with (
        processes.Process(replace(job, model=str(tmp_path))) as process,
        pytest.raises(processes.BenchError, match=r"(?s)ritocco: exit status 1.*config\.json: missing"),
    ):
        process.ready()


def test_work_is_counted_as_everybody_counts_it(tmp_path: Path) -> None:
    """1.609 TFLOP for a guided step of 512 x 512: the figure of Stable Diffusion's UNet in the literature."""
    sizes = folder.SIZES["full"]
    config = SimpleNamespace(unet=sizes["unet"], vae=sizes["vae"])
    counted = flops.flops(config, size=512, outputs=1)  # type: ignore[arg-type]
    assert counted["step"] / 1e12 == pytest.approx(1.609, abs=1e-3)
    assert counted["encode"] / 1e12 == pytest.approx(1.117, abs=1e-3)
    assert counted["decode"] / 1e12 == pytest.approx(2.515, abs=1e-3)


def test_what_a_machine_can_do_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([2.0, 8.0])
    monkeypatch.setattr(ceilings, "ON_CPU", (32, 4096))
    monkeypatch.setattr(ceilings, "_seconds", lambda call, on_gpu: (call(), next(taken))[1])
    found = ceilings.ceilings("cpu", "float32")
    assert found.matmul_flop_per_s == 32**3
    assert found.copy_bytes_per_s == 4096


def test_each_phase_has_a_peak_of_its_own() -> None:
    held = peaks.Peaks("cpu")
    held.begin("small")
    held.begin("large")
    with mmap.mmap(-1, 64 << 20) as block:  # gone at once, as an allocator's may not be
        for _ in range(64):
            block.write(bytes(1 << 20))
    held.end()
    held.begin("small again")
    held.end()
    if not held.held:
        pytest.skip("this system does not count anew")
    assert held.held["large"] - held.held["small"] > 50 << 20
    assert held.held["large"] - held.held["small again"] > 50 << 20


def test_nothing_is_reported_when_the_variants_differ(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_latents(job: worker.Job) -> tuple[worker.Result, float]:
        return in_process(replace(job, seed=job.seed + 1) if job.variant == "ritocco" else job)

    monkeypatch.setattr(command, "execute", other_latents)
    out = tmp_path / "rows.jsonl"
    words = ["--model", str(tiny), "--dtype", "float32", "--pairs", "1", "--size", "64", "--out", str(out)]
    assert command.main(["both", *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "ParityError: float32: relative error" in said.err
    assert not out.exists()


TRUTH = np.linspace(-0.9, 0.9, 3 << 8).reshape(1, 1, 3, 16, 16)


def paints(
    off: dict[tuple[str, str], float], bytes_off: dict[tuple[str, str], int] | None = None
) -> parity.Execute:
    """Processes that paint TRUTH, but for what is added to a variant's floats, and to its pictures' bytes."""

    def run(job: worker.Job) -> tuple[worker.Result, float]:
        name = (job.variant, job.dtype)
        decoded = TRUTH + off.get(name, 0.0)
        pictures = painted_of(np.nan_to_num(decoded)).pictures + np.uint8((bytes_off or {}).get(name, 0))
        painted.Painted(decoded=decoded, pictures=pictures).write(job.painted)
        return worker.Result(loaded=0.0), 0.0

    return run


LOW = {("diffusers", "bfloat16"): 0.01, ("ritocco", "bfloat16"): 0.01}


@pytest.mark.parametrize(
    ("off", "dtype", "passes"),
    [
        ({}, "bfloat16", True),
        ({("ritocco", "bfloat16"): 0.0199}, "bfloat16", True),
        ({("ritocco", "bfloat16"): 0.0201}, "bfloat16", False),
        ({("ritocco", "bfloat16"): np.nan}, "bfloat16", False),
        ({("ritocco", "float32"): 0.8e-4}, "float32", True),
        ({("ritocco", "float32"): 1.1e-4}, "float32", False),
        ({("ritocco", "float32"): np.nan}, "float32", False),
    ],
)
def test_gate_allows_what_it_says(off: dict[tuple[str, str], float], dtype: str, passes: bool) -> None:
    run = paints(LOW | off)
    job = bench(Path("model"), dtype=dtype).job("ritocco")
    if passes:
        assert 30 < parity.gate(job, run).psnr_db <= parity.MOST_DB
    else:
        with pytest.raises(parity.ParityError, match=dtype):
            parity.gate(job, run)


@pytest.mark.parametrize(
    ("bytes_off", "said"),
    [
        (
            {("ritocco", "float32"): 1},
            r"float32: 100\.0% of the pictures' bytes are not diffusers', by up to 1; ",
        ),
        (
            {("ritocco", "bfloat16"): 2},
            r"bfloat16: \S+ from the float32 truth's pictures, diffusers 1\.\S+; ",
        ),
        ({("ritocco", "bfloat16"): 255}, r"bfloat16: the pictures lie 1\.04 bytes from what was decoded; "),
    ],
)
def test_gate_holds_the_pictures_themselves(bytes_off: dict[tuple[str, str], int], said: str) -> None:
    """Floats that are right say nothing of how they become bytes."""
    job = bench(Path("model"), dtype="bfloat16").job("ritocco")
    with pytest.raises(parity.ParityError, match=said):
        parity.gate(job, paints(LOW, bytes_off))


def test_a_measured_picture_is_what_was_decoded() -> None:
    truth = painted_of(TRUTH)
    found = painted.Painted(decoded=TRUTH, pictures=truth.pictures + np.uint8(1))
    assert parity.distance(truth, truth, least_db=25.0, name="ritocco").psnr_db == parity.MOST_DB
    with pytest.raises(
        parity.ParityError, match=r"ritocco: the pictures lie 1\.\d+ bytes from what was decoded"
    ):
        parity.distance(found, truth, least_db=25.0, name="ritocco")


@pytest.mark.parametrize(
    ("ours_db", "peer", "dtype", "passes"),
    [
        (34.1, "diffusers-compiled", "bfloat16", True),
        (33.9, "diffusers-compiled", "bfloat16", False),
        (33.9, "diffusers-float32", "bfloat16", True),
        (33.9, "diffusers-float32", "float32", True),
    ],
)
def test_a_measured_picture_is_held_beside_peers_of_its_dtype(
    ours_db: float, peer: str, dtype: str, passes: bool
) -> None:
    """Only low dtypes: two processes of one kernel in float32 may lie nowhere from each other."""
    held = replace(bench(Path("model"), dtype=dtype), variants=("ritocco", peer))
    found = {"ritocco": replace(PASSED, psnr_db=ours_db), peer: replace(PASSED, psnr_db=40.0)}
    if passes:
        cases.refuse_worse_than_peers(held, found)
    else:
        said = "ritocco: 33.9 dB from the float32 truth, diffusers-compiled 40.0 dB; at most 6 dB less"
        with pytest.raises(parity.ParityError, match=said):
            cases.refuse_worse_than_peers(held, found)


def test_without_diffusers_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "installed", lambda package: package != "diffusers")
    assert command.main([]) == 1
    said = capsys.readouterr()
    assert "diffusers not installed: pip install 'ritocco[bench]'" in said.err
    assert said.out == ""


def test_make_folder_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert command.main(["make-folder", "--out", str(out), "--size", "tiny"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "model_index.json").is_file()


@pytest.mark.slow
def test_backends_are_compared_with_torch_and_with_diffusers(tiny: Path) -> None:
    """Without graphs: every backend is torch here, and one of them is wrong."""
    wanted: list[tuple[str, str]] = []
    sums: list[float] = []
    wrong: set[str] = set()

    def run(job: worker.Job) -> tuple[worker.Result, float]:
        wanted.append((job.variant, job.backend))
        result, started = in_process(replace(job, backend="torch"))
        sums.extend(sum(seconds[phase] for phase in asked.PHASES) for seconds in result.seconds)
        if job.backend in wrong:
            repaint(job.painted, np.negative)
        return result, started

    held, env = bench(tiny, pairs=2), environment.environment("cpu")
    rows = cases.backends(held, ["openvino"], env, peer_dtype="float32", run=run, say=quiet)
    turn = [("ritocco", "torch"), ("ritocco", "openvino"), ("diffusers", "torch")]
    assert wanted == [turn[0], *turn * 3]
    dtypes = {"ritocco": "auto", "ritocco-openvino": "auto", "diffusers": "float32"}
    assert {(row.variant, row.phase, row.dtype) for row in rows} == {
        (variant, phase, dtype)
        for variant, dtype in dtypes.items()
        for phase in ("load", "first_picture", "total")
    }
    assert all(row.samples == 2 for row in rows)
    totals = [row.each_ms for row in rows if row.phase == "total"]
    assert totals == [
        tuple(round(1000 * one, 3) for one in sums[len(turn) + i :: len(turn)]) for i in range(3)
    ]
    assert all(row.parity_psnr_db >= cases.LEAST_PSNR_DB for row in rows)
    wrong.add("openvino")
    with pytest.raises(parity.ParityError, match=r"openvino: .* dB from torch"):
        cases.backends(held, ["openvino"], env, peer_dtype=None, run=run, say=quiet)


@pytest.mark.slow
def test_plain_graphs_are_compared_with_hoisted_ones(tiny: Path) -> None:
    """Without graphs: both folders are the checkpoint, every backend is torch, and one folder is wrong."""
    asked: list[tuple[str, str]] = []
    graphs = {"plain": Path("graphs/plain"), "hoisted": Path("graphs/hoisted")}
    wrong: set[str] = set()

    def run(job: worker.Job) -> tuple[worker.Result, float]:
        asked.append((job.backend, Path(job.model).name))
        result, started = in_process(replace(job, model=str(tiny), backend="torch"))
        if Path(job.model).name in wrong:
            repaint(job.painted, np.negative)
        return result, started

    held, names = bench(tiny, pairs=2), ["openvino", "onnxruntime"]
    rows = cases.hoisted(held, graphs, names, environment.environment("cpu"), run=run, say=quiet)
    turns = [(name, kind) for name in names for kind in graphs]
    assert asked == [("torch", "tiny"), *turns * 2]
    assert {(row.variant, row.phase) for row in rows} == {
        (f"{name}-{kind}", phase) for name, kind in turns for phase in ("denoise", "total")
    }
    assert all(row.samples == 2 and row.dtype == "float32" for row in rows)
    ratios = [line for line in report.table(rows).splitlines() if "pairs" in line]
    assert len(ratios) == 4
    assert ratios[0].startswith("hoisted-64x64-2steps-1x denoise: openvino-plain / openvino-hoisted ")
    wrong.add("hoisted")
    with pytest.raises(parity.ParityError, match=r"openvino-hoisted: .* dB from torch"):
        cases.hoisted(held, graphs, names, environment.environment("cpu"), run=run, say=quiet)
