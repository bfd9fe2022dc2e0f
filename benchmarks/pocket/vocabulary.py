"""The byte-pair vocabulary of the captions, in CLIP's files (Sennrich et al. 2016, arXiv:1508.07909).

Merges are learned here and not by `tokenizers`, whose trainer breaks ties by hash order: two runs gave two
vocabularies, and a training that resumed with the other one read other words.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from pocket.data import caption_of
from pocket.subjects import SUBJECTS

MERGES = 614
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
BACKGROUND = ("background", "nothing", "empty")  # what captions without a subject say


def make_vocabulary(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json` for `CLIPTokenizer`: always the same."""
    merges = learn_merges(caption_words(), MERGES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + END for letter in alphabet), *(left + right for left, right in merges)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, BOS, EOS]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def caption_words() -> Counter[str]:
    """How often captions hold each word, in the letters that stand for bytes."""
    rng = np.random.default_rng(0)
    captions = [caption_of(rng, code) for code in SUBJECTS for _ in range(40)]
    captions += [name for names in SUBJECTS.values() for name in names] * 10 + list(BACKGROUND) * 20
    lower = normalizers.Lowercase()
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Counter(word for text in captions for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent merges, one after the other; of equal ones the first in the alphabet."""
    spelled = {word: [*word[:-1], word[-1] + END] for word in sorted(words)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in spelled.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = [best[0] + best[1]]
                at += 1
    return merges
