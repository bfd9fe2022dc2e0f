"""Measure the embedded model on placements and photographs kept out of training: `python -m pocket.evaluate`.

Four questions: does it draw what it is asked for, in words of its training and in others (a judge looks at
the hole), does it continue a background (against the mean colour of the ring around the hole and OpenCV's
Telea), how well does the autoencoder reconstruct, and what do schedulers and guidance change. Every picture
is a row of a JSON-lines file, written at once; a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from scipy.stats import binomtest, wilcoxon
from tqdm import tqdm, trange

import ritocco
from pocket.data import HELD_OUT, Mask, Painter, Pixels, caption_of, hole
from pocket.judge import JUDGE, load_judge
from pocket.phrasings import ASKED
from pocket.subjects import FIRST, SUBJECTS

SCHEDULERS = ("DPMSolverMultistep", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "PNDM", "KLMS")
STEPS = 25
# At full size a hundred of the subjects, drawn once.
EXAMINED = tuple(np.random.default_rng(2024).permutation(list(SUBJECTS))[:100].tolist())
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One picture to paint.

    code: the subject; empty where a background is to be continued. everyday: asked for in a phrase of which
    the captions of training have the subject's name alone.
    """

    code: str
    index: int
    size: int
    scheduler: str = SCHEDULERS[0]
    guidance: float = 7.5
    everyday: bool = False

    @property
    def key(self) -> str:
        """Identifies the row."""
        held = (self.code, self.index, self.size, self.scheduler, self.guidance)
        return "/".join(str(value) for value in held) + ("/everyday" if self.everyday else "")

    def rng(self) -> np.random.Generator:
        """The same hole, background and words for every scheduler, guidance and size."""
        return np.random.default_rng((2024, self.index, int(self.code or "0", 16)))


class Examiner:
    """Paints cases and keeps their rows.

    rows: the JSON-lines file, appended to; rows of the same model's version in it are not painted again.
    """

    def __init__(self, engine: ritocco.Engine, painter: Painter, judge: Path | None, rows: Path) -> None:
        self.engine, self.painter = engine, painter
        self.judge = None if judge is None else load_judge(judge)[0]
        self.path = rows
        self.rows = {row["key"]: row for row in read_rows(rows) if row["version"] == engine.version}

    def run(self, cases: Sequence[Case]) -> list[Row]:
        """The rows of all cases; paints what is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell():
                file.write("\n")  # ends a row that was cut short; empty lines are no rows
            for case in tqdm([case for case in cases if case.key not in self.rows], mininterval=5):
                row = {"key": case.key, "version": self.engine.version, **asdict(case)}
                row |= (self.subject if case.code else self.fill)(case)
                self.rows[case.key] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
        return [self.rows[case.key] for case in cases]

    def subject(self, case: Case) -> Row:
        """Paint a subject; what the judge sees in the hole."""
        assert self.judge is not None
        rng = case.rng()
        canvas = self.painter.background(rng, case.size)
        mask, centre, side = wide_hole(rng, case.size, least=0.4, most=0.9)
        prompt = everyday(case.code) if case.everyday else caption_of(rng, case.code)
        painted = self.paint(canvas, mask, prompt, case)
        probabilities = self.judge.probabilities(window(painted, centre, side))
        ranked = list(probabilities)
        return {
            "prompt": prompt,
            "seen": SUBJECTS[ranked[0]][0],
            "place": ranked.index(case.code) + 1,
            "confidence": round(probabilities[case.code], 5),
        }

    def fill(self, case: Case) -> Row:
        """Take a part of a background out; PSNR in the hole of three ways to fill it."""
        rng = case.rng()
        canvas = self.painter.background(rng, case.size)
        mask, _, _ = wide_hole(rng, case.size, least=0.22, most=0.5)
        ring = cv2.dilate(mask.astype(np.uint8), np.ones((17, 17))).astype(bool) & ~mask
        flat = canvas.copy()
        flat[mask] = canvas[ring].mean(0)
        telea = cv2.inpaint(canvas, mask.astype(np.uint8) * 255, 5, cv2.INPAINT_TELEA)
        painted = self.paint(canvas, mask, "", case)
        ways = {"ours": painted, "ring_mean": flat, "telea": telea.astype(np.uint8)}
        share = float(mask.mean())
        return {"share": share, **{name: psnr(way[mask], canvas[mask]) for name, way in ways.items()}}

    def paint(self, canvas: Pixels, mask: Mask, prompt: str, case: Case) -> Pixels:
        """One prediction. Raises AssertionError where a pixel outside the hole changed."""
        prediction = self.engine.predict(
            {
                "image": canvas,
                "mask": mask,
                "prompt": prompt,
                "width": case.size,
                "height": case.size,
                "num_inference_steps": STEPS,
                "scheduler": case.scheduler,
                "guidance_scale": case.guidance,
                "seed": 1000 + case.index,
            }
        )
        painted = np.asarray(prediction.images[0])
        assert (painted[~mask] == canvas[~mask]).all(), f"{case.key}: pixels outside the hole changed"
        return painted


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; what is none, as a line that an interruption cut short, is left out."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if is_row(row):
            yield row


def is_row(row: object) -> bool:
    """Whether it holds all that is measured of a case, as finite numbers."""
    numbers: tuple[Any, ...]
    match row:
        case {"key": str(), "version": str(), "code": "", "share": a, "ours": b, "ring_mean": c, "telea": d}:
            numbers = (a, b, c, d)
        case {"key": str(), "version": str(), "code": str(), "place": a, "confidence": b}:
            numbers = (a, b)
        case _:
            return False
    return all(isinstance(one, int | float) and math.isfinite(one) for one in numbers)


def wide_hole(
    rng: np.random.Generator, size: int, *, least: float, most: float
) -> tuple[Mask, tuple[float, float], int]:
    """A hole whose subject is `least` to `most` of the picture's side."""
    while True:
        mask, centre, side = hole(rng, size)
        if least <= side / size <= most and mask.mean() <= 0.85:
            return mask, centre, side


def window(picture: Pixels, centre: tuple[float, float], side: int) -> Pixels:
    """The square of the hole, cut at the picture's edges, a little wider than the subject."""
    half = int(side * 0.54)
    y, x = round(centre[0]), round(centre[1])
    return picture[max(0, y - half) : y + half, max(0, x - half) : x + half]


def psnr(result: Pixels, truth: Pixels) -> float:
    """Decibels over 255."""
    error = float(np.square(result.astype(np.float64) - truth.astype(np.float64)).mean())
    return float(10 * np.log10(255.0**2 / max(error, 1e-9)))


def reconstruction(engine: ritocco.Engine, painter: Painter, count: int) -> list[float]:
    """PSNR of the autoencoder on held-out composites of 256 pixels."""
    rng, out = np.random.default_rng(77), []
    for _ in trange(count, mininterval=5):
        image = painter.sample(rng, 256).image
        pixels = image.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        decoded = engine.runtime.decode(engine.runtime.encode_image(pixels))[0].transpose(1, 2, 0)
        out.append(psnr(np.clip(np.rint((decoded + 1) * 127.5), 0, 255).astype(np.uint8), image))
    return out


def everyday(code: str) -> str:
    """A phrase for the subject; each of `ASKED` is had by every 25th subject."""
    names = SUBJECTS[code]
    return ASKED[tuple(SUBJECTS).index(code) % len(ASKED)].format(names[len(ASKED) % len(names)])


def subject_cases(codes: Sequence[str], size: int, each: int, **settings: Any) -> list[Case]:
    """`each` pictures of every subject of `codes`."""
    return [Case(code=code, index=i, size=size, **settings) for i in range(each) for code in codes]


def recognised(rows: Sequence[Row]) -> str:
    """Share of the pictures in which the judge names the subject first, with its 95 % Wilson interval."""
    right = sum(row["place"] == 1 for row in rows)
    bounds = binomtest(right, len(rows)).proportion_ci(method="wilson")
    share = f"{100 * right / len(rows):.1f} % ({100 * bounds.low:.1f} to {100 * bounds.high:.1f})"
    return f"{share} of {len(rows)}"


def compared(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """The judge's mean confidence in the asked subject in `rows`, against `others` on the same placements."""
    mine, theirs = ([row["confidence"] for row in some] for some in (rows, others))
    p = wilcoxon(mine, theirs).pvalue
    return f"confidence {np.mean(mine):.3f} against {np.mean(theirs):.3f} (Wilcoxon signed-rank, p = {p:.1g})"


def report(examiner: Examiner, parts: Sequence[str], *, quick: bool) -> Iterator[str]:
    """Lines of a Markdown table; paints as it goes."""
    size, each = (256, 1) if quick else (512, 4)
    codes = tuple(SUBJECTS) if quick else EXAMINED
    some, of = (sorted(FIRST), " favourites") if quick else (codes, "")
    if "subjects" in parts:
        rows = examiner.run(subject_cases(codes, size, each))
        yield f"| subject recognised, DPMSolverMultistep | {recognised(rows)} |"
        missed = [code for code in codes if not any(r["place"] == 1 for r in rows if r["code"] == code)]
        yield f"| subjects never recognised | {', '.join(SUBJECTS[c][0] for c in missed) or 'none'} |"
    if "everyday" in parts:
        rows = examiner.run(subject_cases(some, size, 1, everyday=True))
        yield f"| recognised, asked for in everyday words | {recognised(rows)}{of} |"
        wrong = sorted(f"{row['prompt']} ({row['seen']})" for row in rows if row["place"] != 1)
        yield f"| not recognised of these | {', '.join(wrong) or 'none'} |"
    if "schedulers" in parts:
        for scheduler in SCHEDULERS[1:]:
            rows = examiner.run(subject_cases(some, size, 1, scheduler=scheduler))
            yield f"| recognised with {scheduler} | {recognised(rows)}{of} |"
    if "guidance" in parts:
        usual = examiner.run(subject_cases(codes, size, 1))
        rows = examiner.run(subject_cases(codes, size, 1, guidance=1.0))
        yield f"| recognised at guidance 1 | {recognised(rows)} |"
        yield f"| guidance 1 against 7.5 | {compared(rows, usual)} |"
    if "background" in parts:
        cases = [Case(code="", index=i, size=size) for i in range(24 if quick else 60)]
        rows = [row for row in examiner.run(cases) if 0.05 <= row["share"] <= 0.25]
        ours, *others = ([row[name] for row in rows] for name in ("ours", "ring_mean", "telea"))
        against = ", ".join(
            f"{name} {np.mean(values):.2f} dB (Wilcoxon signed-rank, p = {wilcoxon(ours, values).pvalue:.1g})"
            for name, values in zip(("ring_mean", "telea"), others, strict=True)
        )
        count, mean = len(rows), np.mean(ours)
        yield f"| background continued, PSNR in the hole, mean of {count} | {mean:.2f} dB; {against} |"
    if "autoencoder" in parts:
        values = reconstruction(examiner.engine, examiner.painter, 24 if quick else 100)
        spread = f"{np.min(values):.1f} to {np.max(values):.1f}"
        yield f"| autoencoder, mean of {len(values)} | {np.mean(values):.2f} dB ({spread}) |"


def main(say: Callable[[str], None] = print) -> None:
    """Command line."""
    every = ("subjects", "everyday", "guidance", "schedulers", "background", "autoencoder")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(every))
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="default: the embedded one")
    parser.add_argument("--judge", type=Path, default=JUDGE, help="made by pocket.judge")
    parser.add_argument("--rows", type=Path, required=True, help="a JSON-lines file")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="256 pixels, one picture of every subject; everyday words and schedulers on the favourites",
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(every):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    torch.set_grad_enabled(False)
    try:
        engine = ritocco.load(args.model)
        examiner = Examiner(engine, Painter(args.assets, photographs=HELD_OUT), args.judge, args.rows)
        say("| measured | result |\n|---|---|")
        for line in report(examiner, args.parts or every, quick=args.quick):
            say(line)
    except (OSError, SafetensorError, ritocco.RitoccoError) as error:
        parser.exit(1, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped; what was painted is kept in {args.rows}\n")


if __name__ == "__main__":
    main()
