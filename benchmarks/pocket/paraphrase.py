"""Teach the text encoder to hear a subject among words that it does not know: `python -m pocket.paraphrase`.

The encoder learns to give for any phrase what it gave for a caption of training that asks for the same, and
for words of which it knows none what it gave for an empty prompt: a UNet meets nothing that captions had not
shown it. A state goes to its like: before the name, the name, and what follows it, which in CLIP's padding is
the end token over and over. Captions of training have to keep their states.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from pocket.data import caption_of, empty_caption
from pocket.phrasings import ASKED, Phrase, Phrasebook
from pocket.subjects import SUBJECTS

CAPTIONS, BABBLE = 0.3, 0.15  # shares of captions of training, and of phrases without a subject
HELD = 500  # phrases of the test


@dataclass(frozen=True, slots=True)
class Read:
    """Tokens [77] of a phrase. first, last: places of the name's first token, and behind its last."""

    tokens: list[int]
    first: int
    last: int


class Reader:
    """Tokenises phrases."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.length = tokenizer.model_max_length

    def read(self, phrase: Phrase) -> Read:
        """Cut at 77 tokens, the last of them an end."""
        parts = [
            self.tokenizer(text, add_special_tokens=False).input_ids if text else []
            for text in (phrase.before, phrase.name, phrase.after)
        ]
        first = 1 + len(parts[0])
        tokens = [self.tokenizer.bos_token_id, *parts[0], *parts[1], *parts[2]][: self.length - 1]
        ends = [self.tokenizer.eos_token_id] * (self.length - len(tokens))
        return Read([*tokens, *ends], first, first + len(parts[1]))


def counterparts(ours: Read, theirs: Read) -> list[int]:
    """For each place of `ours` the place of `theirs` whose state it has to have.

    The start's; before the name the same place, at most the one before the name; in the name counted from its
    end; from there on as far behind the name, in the order of places.
    """
    out = []
    for place in range(len(ours.tokens)):
        if place < ours.first:
            like = min(place, theirs.first - 1)
        elif place < ours.last:
            like = max(theirs.first, theirs.last - (ours.last - place))
        else:
            like = theirs.last + place - ours.last
        out.append(min(like, len(theirs.tokens) - 1))
    return out


def pair(rng: np.random.Generator, book: Phrasebook) -> tuple[Phrase, Phrase]:
    """A phrase to learn, and one whose states it has to have."""
    kind = rng.random()
    if kind < CAPTIONS:
        code = str(rng.choice(book.codes))
        caption = empty_caption(rng) if rng.random() < 0.1 else caption_of(rng, code)
        same = Phrase(caption, "", "", "")
        return same, same
    phrase = book.babble(rng) if kind < CAPTIONS + BABBLE else book.phrase(rng, str(rng.choice(book.codes)))
    return phrase, book.known(rng, phrase)


def batch(
    rng: np.random.Generator, book: Phrasebook, reader: Reader, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [N,77]: tokens, tokens of the counterparts, and places in these."""
    ours, theirs, places = [], [], []
    for _ in range(count):
        phrase, known = pair(rng, book)
        mine, other = reader.read(phrase), reader.read(known)
        ours.append(mine.tokens)
        theirs.append(other.tokens)
        places.append(counterparts(mine, other) if phrase.subject else list(range(reader.length)))
    return torch.tensor(ours), torch.tensor(theirs), torch.tensor(places)


def understood(text: Any, reader: Reader, anchors: Tensor, phrases: list[Phrase]) -> float:
    """Share of phrases whose mean state from the name on lies nearest to that of their subject's caption.

    anchors: [subjects + 1, D], the last of the empty prompt.
    """
    codes = [*SUBJECTS, ""]
    found = summary(text, [reader.read(phrase) for phrase in phrases])
    nearest = torch.cdist(found, anchors).argmin(1).tolist()
    return float(np.mean([codes[k] == phrase.subject for k, phrase in zip(nearest, phrases, strict=True)]))


@torch.no_grad()
def summary(text: Any, read: list[Read]) -> Tensor:
    """Mean state of the last forty places [N,D]."""
    return torch.cat([
        text(torch.tensor([one.tokens for one in read[i : i + 100]])).last_hidden_state[:, -40:].mean(1)
        for i in range(0, len(read), 100)
    ])  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="a folder with text_encoder/ and tokenizer/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where the new text_encoder/ and tokenizer/ go"
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--peak", type=float, default=1.5e-3)
    args = parser.parse_args()
    if (args.out / "text_encoder").exists():
        print(f"{args.out / 'text_encoder'}: is there already")
        return
    torch.manual_seed(0)
    shutil.copytree(args.model / "tokenizer", args.out / "tokenizer", dirs_exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(str(args.model / "tokenizer"))
    reader, book = Reader(tokenizer), Phrasebook()
    teacher: Any = CLIPTextModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32)
    teacher.requires_grad_(False)
    text: Any = copy.deepcopy(teacher).requires_grad_(True)
    anchors = summary(teacher, [reader.read(Phrase("a", names[0], "", "")) for names in SUBJECTS.values()])
    anchors = torch.cat([anchors, summary(teacher, [reader.read(Phrase("", "", "", ""))])])
    rng = np.random.default_rng(11)
    held = [book.phrase(rng, str(rng.choice(book.codes))) for _ in range(HELD)]
    asked = [
        Phrase(before.strip(), names[0], after.strip(), code)
        for code, names in SUBJECTS.items()
        for before, after in (words.split("{}") for words in ASKED)
    ]

    def report(when: str) -> None:
        say = {
            "phrases": held,
            "evaluation": asked,
            "nothing": [book.babble(np.random.default_rng(k)) for k in range(200)],
        }
        shares = ", ".join(
            f"{name} {understood(text, reader, anchors, some):.3f}" for name, some in say.items()
        )
        print(f"understood {when}: {shares}", flush=True)

    report("before")
    weights = list(text.parameters())
    optimizer = torch.optim.AdamW(weights, lr=args.peak, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.peak, args.steps, pct_start=0.05)
    bar = tqdm(range(args.steps), mininterval=10)
    for step in bar:
        ours, theirs, places = batch(rng, book, reader, args.batch)
        with torch.no_grad():
            states = teacher(theirs).last_hidden_state
            wanted = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        loss = (text(ours).last_hidden_state - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if step % 500 == 499:
            report(f"after {step + 1}")
    report("after all")
    written = args.out / "text_encoder.part"
    text.half().save_pretrained(written)
    written.rename(args.out / "text_encoder")


if __name__ == "__main__":
    main()
