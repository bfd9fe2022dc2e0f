"""The recipe of the embedded model: its data, its start, its training loop, its judge. No training of use."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

from pocket import data, denoiser
from pocket.average import average
from pocket.data import HELD_OUT, PHOTOGRAPHS, caption_of, hole, paste
from pocket.denoiser import (
    AGREE_FROM,
    AGREE_FULLY,
    AGREEMENT,
    DROPPED,
    REHEARSAL,
    Stages,
    agreement_weight,
    drop_rate,
    mixture,
    v_loss,
)
from pocket.evaluate import (
    EXAMINED,
    Case,
    Examiner,
    Row,
    compared,
    everyday,
    is_row,
    psnr,
    recognised,
    subject_cases,
    wide_hole,
    window,
)
from pocket.initial import start_as_block_means
from pocket.judge import CODES, JUDGE, SIDE, Judge, load_judge
from pocket.models import VAE
from pocket.muon import Muon, orthogonal
from pocket.norm import quicken
from pocket.paraphrase import Reader, counterparts, pair
from pocket.phrasings import ASKED, Phrase, Phrasebook, words_of
from pocket.subjects import FIRST, SUBJECTS
from pocket.training import Schedule, Trainer, run, seed
from pocket.vocabulary import learn_merges, make_vocabulary
from pocket.words import CODES as WORDS
from pocket.words import NOTHING, captions, endings
from ritocco.loading import pocket_model


def smooth_picture(side: int = 64) -> torch.Tensor:
    """float [1,3,side,side] in [-1,1] without detail that block means would lose."""
    ys, xs = torch.meshgrid(*(torch.linspace(0, 1, side),) * 2, indexing="ij")
    return torch.stack([0.8 * xs - 0.2, 0.5 - ys, xs * ys])[None]


def test_the_autoencoder_starts_as_block_means() -> None:
    torch.manual_seed(0)
    model: Any = AutoencoderKL(**VAE).eval()  # type: ignore[no-untyped-call, attr-defined]
    picture = smooth_picture()
    with torch.no_grad():
        start_as_block_means(model)
        latents = model.encode(picture).latent_dist.mean
        decoded = model.decode(latents).sample
    means = torch.nn.functional.avg_pool2d(picture, 8)
    ratio = latents[:, :3] / means
    near = means.abs() > 0.1
    assert float((ratio[near] / 2 - 1).abs().max()) < 0.15
    assert float((decoded - picture)[..., 8:-8, 8:-8].square().mean()) < 6e-3


def test_captions_are_dropped_where_a_subject_shows() -> None:
    alpha_bar = torch.tensor([0.999, 0.5, 0.02, 0.005, 0.001])
    small, large = torch.zeros(2, 5, 1, 64, 64).unbind()
    small[..., :6, :6] = 1
    large[..., :40, :40] = 1
    of_small, of_large = drop_rate(alpha_bar, small), drop_rate(alpha_bar, large)
    assert of_small[0] == of_large[0] == 0.5
    assert DROPPED < of_small[1] < 0.5
    assert (of_small[:-1] >= of_small[1:]).all()
    assert (of_large >= of_small).all(), "a large subject shows earlier"
    assert of_large[2] > 50 * of_small[2]
    assert of_small[-1] < DROPPED / 50
    assert not drop_rate(alpha_bar, torch.zeros_like(small))[2:].gt(DROPPED / 50).any()


def test_guidance_ends_where_the_picture_is_plain() -> None:
    sigma = torch.tensor([14.0, AGREE_FROM, 1.25, AGREE_FULLY, 0.1])
    weight = agreement_weight(1 / (1 + sigma**2))
    assert weight[:2].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert 0 < weight[2] < 1
    assert weight[3:].tolist() == pytest.approx([1, 1])


class Echo(nn.Module):
    """Answers with zeros, plus `heed` times the mean of the context."""

    def __init__(self, heed: float) -> None:
        super().__init__()
        self.heed, self.rows = heed, 0

    def forward(
        self, sample: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        self.rows = len(sample)
        return (torch.zeros_like(sample[:, :4]) + self.heed * context.mean((1, 2)).view(-1, 1, 1, 1),)


@pytest.mark.parametrize(("noise", "pairs"), [(1e-4, 6), (0.9999, 0)])
def test_the_loss_compares_with_and_without_caption(noise: float, pairs: int) -> None:
    """Eight pictures, two of them with an empty prompt, which has no pair."""

    def text(tokens: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=tokens[..., None].float())

    blank = torch.zeros(3, dtype=torch.long)
    batch = (torch.zeros(8, 4, 6, 6), torch.zeros(8, 4, 6, 6), torch.ones(8, 1, 6, 6))
    tokens = torch.tensor([[1, 2, 3]] * 6 + [[0, 0, 0]] * 2)
    alpha_bar = torch.full((1000,), 1 - noise)
    deaf, heeding = Echo(0.0), Echo(0.25)
    losses = []
    for echo in (deaf, heeding):
        torch.manual_seed(1)
        loss, parts = v_loss(echo, text, alpha_bar, blank, (*batch, tokens))
        losses.append(float(loss))
        assert echo.rows == 8 + pairs
        assert parts["apart"] == pytest.approx(0.25 if echo is heeding and pairs else 0, abs=1e-6)
    if pairs:
        assert losses[1] - losses[0] > AGREEMENT * 0.25 * 6 / 8 - 0.5, "disagreement costs"


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_pictures_are_mixed_as_a_sampler_has_them(alone: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM from noise alone at the last timestep, with a network that knows the picture."""
    monkeypatch.setattr(denoiser, "FROM_NOISE_ALONE", alone)
    monkeypatch.setattr(denoiser, "STARTS_FROM", 999)
    x0, noise = torch.full((1, 4, 2, 2), 2.0), torch.randn(1, 4, 2, 2)
    monkeypatch.setattr(torch, "randn", lambda shape: noise)
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sample = noise if alone else signal[999] * x0 + sigma[999] * noise
    for before, after in ((999, 960), (960, 500), (500, 1)):
        taken = (sample - signal[before] * x0) / sigma[before]
        sample = signal[after] * x0 + sigma[after] * taken
        mixed = mixture(x0, torch.tensor([after]), alpha_bar)
        torch.testing.assert_close(mixed, sample, atol=1e-4, rtol=1e-4)
    assert (mixture(x0, torch.tensor([999]), alpha_bar) - noise).abs().max() < (1e-6 if alone else 0.2)


def test_a_smooth_fill_keeps_what_is_known_and_continues_a_slope() -> None:
    slope = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (64, 64, 3)).copy()
    mask = np.zeros((64, 64), bool)
    mask[20:40, 25:45] = True
    holed = slope.copy()
    holed[mask] = 255
    filled = data.smooth_fill(holed, mask)
    assert (filled[~mask] == slope[~mask]).all()
    assert np.abs(filled[mask] - slope[mask].astype(float)).max() < 15
    everything = data.smooth_fill(slope, np.ones((64, 64), bool))
    assert np.isfinite(everything).all()


def test_background_in_holes_is_softened(monkeypatch: pytest.MonkeyPatch) -> None:
    painter: Any = SimpleNamespace(
        background=lambda rng, size: rng.integers(0, 256, (size, size, 3)).astype(np.uint8),
        _clutter=lambda rng, canvas: None,
    )
    sample = data.Painter.sample
    hard, soft = (
        sample(painter, np.random.default_rng(4), 64, empty=1.0, softened=share) for share in (0.0, 0.5)
    )
    assert (hard.mask == soft.mask).all()
    assert (hard.image[~hard.mask] == soft.image[~soft.mask]).all()
    spread = [float(one.image[one.mask].std()) for one in (hard, soft)]
    assert 0.4 < spread[1] / spread[0] < 0.65


def test_dead_leaves_have_edges_and_are_seeded() -> None:
    pictures = [data._leaves(np.random.default_rng(seed), 64) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()
    assert all(picture.shape == (64, 64, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert np.abs(np.diff(pictures[0].astype(int), axis=1)).max() > 20


def test_stages_grow_and_look_back() -> None:
    stages = Stages.parse("128:300,256:200")
    assert stages.total == 500
    sizes = [stages.size_of(step, 0) for step in range(600)]
    assert set(sizes[:300]) == {128}
    back = sizes[300:].count(128) / 300
    assert abs(back - REHEARSAL) < 0.08
    assert sizes == [stages.size_of(step, 0) for step in range(600)]


@pytest.mark.parametrize("size", [128, 256, 512])
def test_a_subject_fits_its_hole(size: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        mask, centre, side = hole(rng, size)
        assert mask.shape == (size, size)
        assert 36 <= side <= size
        assert mask[min(size - 1, round(centre[0])), min(size - 1, round(centre[1]))]
        drawn = np.zeros((size, size, 3), np.uint8)
        paste(drawn, np.full((32, 32, 4), 255, np.uint8), centre, side, mask)
        assert drawn[mask].any()
        assert not drawn[~mask].any()


def test_captions_name_the_subject() -> None:
    rng = np.random.default_rng(0)
    for code, names in SUBJECTS.items():
        phrase = caption_of(rng, code).lower()
        assert any(name in phrase for name in names)
    assert set(SUBJECTS) >= FIRST
    assert len(SUBJECTS) >= 100
    assert not set(HELD_OUT) & set(PHOTOGRAPHS)


@pytest.fixture(scope="module")
def book() -> Phrasebook:
    return Phrasebook()


def test_phrases_name_their_subject_among_words_that_are_kept_from_the_evaluation(book: Phrasebook) -> None:
    rng = np.random.default_rng(0)
    for code in SUBJECTS:
        phrase = book.phrase(rng, code)
        assert phrase.subject == code
        assert {phrase.name, phrase.name[:-1]} & set(SUBJECTS[code])
        assert f" {phrase.name} " in f" {phrase.text} "
        assert book.known(rng, phrase).name in SUBJECTS[code]
    lists = {*book.nouns, *book.adjectives, *book.verbs}
    assert len(lists) > 7000
    assert not words_of(" ".join(ASKED)) & lists
    assert not book.single & lists
    assert {book.babble(rng).subject for _ in range(20)} == {""}


def test_words_that_make_another_subject_of_a_name_are_left_out(book: Phrasebook) -> None:
    assert book._means_another("green", "apple", "1f34e")
    assert not book._means_another("green", "green apple", "1f34f")
    assert not book._means_another("purple", "banana", "1f34c")
    rng = np.random.default_rng(1)
    assert all("green" not in book.phrase(rng, "1f34e").before.split() for _ in range(300))


def test_a_state_has_its_like_in_the_other_phrase() -> None:
    reader = Reader(CLIPTokenizer.from_pretrained(str(pocket_model() / "tokenizer")))
    ours = reader.read(Phrase("my", "yellow cat", "on grass", "1f431"))
    theirs = reader.read(Phrase("a photo of a", "cat", "", "1f431"))
    count = len(reader.tokenizer("my", add_special_tokens=False).input_ids)
    assert (ours.first, theirs.last - theirs.first) == (1 + count, 1)
    places = counterparts(ours, theirs)
    assert places[: ours.first] == list(range(ours.first))
    assert set(places[ours.first : ours.last]) == {theirs.first}
    assert places[ours.last : ours.last + 3] == [theirs.last, theirs.last + 1, theirs.last + 2]
    assert places[-1] == 76
    assert len(ours.tokens) == len(places) == 77
    long = reader.read(Phrase("a", "cat", "grass " * 90, "1f431"))
    assert len(long.tokens) == 77
    assert long.tokens[-1] == reader.tokenizer.eos_token_id


def test_captions_keep_their_states(book: Phrasebook) -> None:
    rng = np.random.default_rng(2)
    pairs = [pair(rng, book) for _ in range(200)]
    same = [ours for ours, theirs in pairs if ours == theirs]
    assert 30 < len(same) < 90
    assert sum(not ours.subject and theirs.text == "" for ours, theirs in pairs) > 15


def test_plain_grounds_are_of_one_colour() -> None:
    rng = np.random.default_rng(0)
    grounds = [data._plain(rng, 64) for _ in range(60)]
    assert any((ground == 255).all() for ground in grounds)
    assert any(ground.max() < 50 for ground in grounds)
    assert max(np.abs(np.diff(ground.astype(int), axis=0)).max() for ground in grounds) <= 3


def test_merges_are_learned_in_a_fixed_order() -> None:
    merges = learn_merges(Counter({"abab": 3, "ba": 1, "cd": 6}), 3)
    assert merges == [("c", "d</w>"), ("a", "b"), ("a", "b</w>")]


def test_the_vocabulary_is_the_embedded_one(tmp_path: Path) -> None:
    make_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (pocket_model() / "tokenizer" / name).read_bytes()


def test_the_quick_group_norm_has_the_gradients_of_torch() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 12, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 12, 5, 3, dtype=torch.float64)
    results = []
    for _ in range(2):
        out = (norm(x.contiguous(memory_format=torch.channels_last)) * weights).sum()
        results.append(torch.autograd.grad(out, (x, norm.weight, norm.bias)))
        quicken(norm)
    for slow, quick in zip(*results, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)])
def test_an_update_of_muon_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((u.T @ orthogonal(matrix) @ v.T).diagonal().min()) > 0.5


def test_muon_descends() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3))
    optimizer = Muon([weight], lr=0.1)
    start = float(weight.detach().norm())
    for _ in range(40):
        optimizer.zero_grad()
        weight.square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(weight.detach().norm()) < 0.6 * start


def test_captions_are_labelled() -> None:
    texts, labels = captions(np.random.default_rng(0), 300)
    for text, label in zip(texts, labels.tolist(), strict=True):
        if label == NOTHING:
            assert text in {"", "background", "nothing", "empty background"}
        else:
            assert any(name in text.lower() for name in SUBJECTS[WORDS[label]])
    assert 2 <= int((labels == NOTHING).sum()) <= 40
    assert endings(torch.tensor([[1, 5, 9, 9]]), 9).tolist() == [[False, False, True, True]]


def test_a_run_that_goes_on_draws_anew_and_logs_what_it_saw(tmp_path: Path) -> None:
    def trainer(steps: int) -> Trainer:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
        return Trainer(modules={"net": net}, folder=tmp_path, schedule=Schedule(steps=steps, peak=1e-3))

    def loss_of(one: Trainer) -> Any:
        draws.append(float(torch.rand(())))
        out = one.modules["net"](torch.ones(1, 3, 8, 8, dtype=torch.bfloat16))
        return out.float().square().mean(), {"one": 1.0}

    draws: list[float] = []
    first = trainer(70)
    assert seed(first, 0) == (0, 0)
    run(first, itertools.repeat(None), lambda _: loss_of(first))
    with (tmp_path / "curve.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 100, "one": 5.0}\n')  # after the state
        log.write('{"step": 1')  # cut short
    second = trainer(150)
    assert seed(second, 0) == (0, 70)
    run(second, itertools.repeat(None), lambda _: loss_of(second))
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["one"]) for row in rows] == [(50, 1.0), (100, 1.0), (150, 1.0)]
    assert len(set(draws)) == 150


@pytest.mark.parametrize("muon", [False, True])
def test_training_resumes_where_it_stopped(tmp_path: Path, *, muon: bool) -> None:
    def trainer() -> Trainer:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
        schedule = Schedule(steps=9, peak=1e-2, warmup=2)
        return Trainer(modules={"net": net}, folder=tmp_path, schedule=schedule, muon=muon)

    def steps(one: Trainer, count: int) -> None:
        for _ in range(count):
            batch = torch.randn(
                2, 3, 8, 8, generator=torch.Generator().manual_seed(one.step), dtype=torch.float32
            )
            one.update(one.modules["net"](batch.bfloat16()).float().square().mean())

    through, first = trainer(), trainer()
    before = {name: t.clone() for name, t in through.averaged()["net"].items()}
    steps(through, 6)
    steps(first, 3)
    first.save()
    second = trainer()
    assert second.resume()
    assert second.step == 3
    steps(second, 3)
    for name, tensor in through.averaged()["net"].items():
        torch.testing.assert_close(second.averaged()["net"][name], tensor, rtol=0, atol=0)
        assert not torch.equal(tensor, before[name])


def test_the_judge_ranks_every_subject() -> None:
    torch.manual_seed(0)
    pictures = [np.full((side, side, 3), 90, np.uint8) for side in (SIDE, 200)]
    for picture in pictures:
        probabilities = Judge().eval().probabilities(picture)
        assert sorted(probabilities) == sorted(CODES)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert sum(probabilities.values()) == pytest.approx(1)


def test_the_judge_that_is_kept_is_unsure_of_a_plain_square() -> None:
    judge, facts = load_judge(JUDGE)
    assert float(facts["accuracy"]) >= 0.99
    rng, drawing = np.random.default_rng(0), np.zeros((64, 64, 3), np.uint8)
    drawing[...] = rng.integers(0, 256, 3)
    assert judge.probabilities(drawing)[judge.names(drawing)] < 0.9


def test_the_evaluation_asks_the_same_of_everyone() -> None:
    cases = subject_cases(tuple(SUBJECTS), 256, 2)
    assert len({case.key for case in cases}) == 2 * len(SUBJECTS)
    assert len(set(EXAMINED)) == 100
    assert set(EXAMINED) <= set(SUBJECTS)
    asked = {everyday(code) for code in SUBJECTS}
    assert len(asked) == len(SUBJECTS)
    assert any(text.endswith("on a hill") for text in asked)
    assert Case(code="1f34e", index=0, size=512, everyday=True).key.endswith("/everyday")
    one, other = cases[0], Case(code=cases[0].code, index=0, size=512, scheduler="PNDM")
    assert one.key != other.key
    assert one.rng().random() == other.rng().random()
    mask, centre, side = wide_hole(one.rng(), 256, least=0.4, most=0.9)
    assert 0.4 <= side / 256 <= 0.9
    assert window(np.zeros((256, 256, 3), np.uint8), centre, side).shape[0] <= 256
    assert mask.any()


def test_figures_of_the_evaluation() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(grey, black) == pytest.approx(20 * np.log10(5))
    rows = [{"place": 1}] * 85 + [{"place": 2}] * 15
    assert recognised(rows) == "85.0 % (76.7 to 90.7) of 100"
    less = [{"confidence": 0.1 + 0.01 * i} for i in range(20)]
    more = [{"confidence": 0.2 + 0.012 * i} for i in range(20)]  # 2 of 2^20 orders of signs are as extreme
    assert compared(less, more) == "confidence 0.195 against 0.314 (Wilcoxon signed-rank, p = 2e-06)"


def test_what_is_no_row_is_painted_again() -> None:
    filled = {
        "key": "a",
        "version": "b",
        "code": "",
        "share": 0.1,
        "ours": 30.0,
        "ring_mean": 20,
        "telea": 1.0,
    }
    seen: Row = {"key": "a", "version": "b", "code": "1f34e", "place": 1, "confidence": 0.5}
    assert is_row(filled)
    assert is_row(seen)
    bad: list[Row] = [
        {"ours": float("nan")},
        {"share": "x"},
        {"key": [1]},
        {"version": None},
        {"code": "1f34e"},
    ]
    assert not any(is_row(filled | change) for change in bad)
    others: list[object] = [[], "row", {}, {"key": "a", "version": "b"}, seen | {"place": None}]
    assert not any(map(is_row, others))


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Plain(Examiner):
        painted: ClassVar[list[str]] = []

        def fill(self, case: Case) -> Row:
            self.painted.append(case.key)
            return {"share": 0.1, "ours": 1.0, "ring_mean": 1.0, "telea": 1.0}

    cases, rows = [Case(code="", index=i, size=64) for i in range(4)], tmp_path / "rows.jsonl"
    engine: Any = SimpleNamespace(version="one")
    painter: Any = None
    Plain(engine, painter, None, rows).run(cases[:2])
    rows.write_text(rows.read_text() + '{"key": "cut sh')
    found = Plain(engine, painter, None, rows).run(cases)
    assert Plain.painted == [case.key for case in cases]
    assert [row["index"] for row in found] == [0, 1, 2, 3]
    Plain(engine, painter, None, rows).run(cases)
    assert len(Plain.painted) == 4
    Plain(SimpleNamespace(version="two"), painter, None, rows).run(cases[:1])  # type: ignore[arg-type]
    assert len(Plain.painted) == 5


def test_weights_are_averaged_in_the_dtype_of_the_newer(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "other"))
    save_file({"w": torch.tensor([0.0, 4.0])}, old)
    save_file({"w": torch.tensor([8.0, 0.0], dtype=torch.float16)}, new, metadata={"format": "pt"})
    save_file({"w": torch.zeros(3)}, other)
    average(old, new, tmp_path / "deep" / "out.safetensors", share=0.25)
    made = load_file(tmp_path / "deep" / "out.safetensors")["w"]
    assert (made.tolist(), made.dtype) == ([2.0, 3.0], torch.float16)
    with pytest.raises(ValueError, match="hold other tensors"):
        average(old, other, tmp_path / "out", share=0.5)
    with pytest.raises(ValueError, match=r"share is 1\.5; it must be from 0 to 1"):
        average(old, new, tmp_path / "out", share=1.5)
