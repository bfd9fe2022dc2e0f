"""Teach the text encoder which subject a caption names, before pictures are drawn: `python -m pocket.words`.

Cross-attention then finds each subject told apart from the first step on. The encoder learns to say the
subject at the caption's end and at every place after it, where CLIP's padding repeats the end token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pocket.data import caption_of, empty_caption
from pocket.models import TEXT
from pocket.subjects import SUBJECTS
from pocket.vocabulary import make_vocabulary

CODES = tuple(SUBJECTS)
NOTHING = len(CODES)


def captions(rng: np.random.Generator, count: int) -> tuple[list[str], Tensor]:
    """Captions and the subject that each names; NOTHING for those that name none."""
    labels = rng.integers(NOTHING + 6, size=count).clip(max=NOTHING)
    texts = [empty_caption(rng) if n == NOTHING else caption_of(rng, CODES[n]) for n in labels]
    return texts, torch.from_numpy(labels)


def endings(tokens: Tensor, end: int) -> Tensor:
    """bool [N,77]: the first end token and all after it."""
    return (tokens == end).cumsum(1) > 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--peak", type=float, default=2e-3)
    args = parser.parse_args()
    model = args.work / "words"
    if (model / "text_encoder").exists():
        print(f"{model}: is there already")
        return
    make_vocabulary(model / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(str(model / "tokenizer"))
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends)
    text: Any = CLIPTextModel(config)
    head = nn.Linear(config.hidden_size, NOTHING + 1)
    weights = [*text.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.peak, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.peak, args.steps, pct_start=0.1)
    rng = np.random.default_rng(5)
    bar = tqdm(range(args.steps), mininterval=10)
    for _ in bar:
        texts, labels = captions(rng, args.batch)
        pooled = described(text, tokenizer, texts)
        loss = sum((F.cross_entropy(head(p), labels, label_smoothing=0.05) for p in pooled), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        texts, labels = captions(np.random.default_rng(6), 500)
        found = head(described(text.eval(), tokenizer, texts)[0]).argmax(1)
    print(f"captions understood: {float((found == labels).float().mean()):.3f} of {len(texts)}")
    written = model / "text_encoder.part"
    text.half().save_pretrained(written)
    written.rename(model / "text_encoder")


def described(text: Any, tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Mean state from the end token on, and the state at the end token: float32 [N,D] each."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = text(tokens).last_hidden_state
    after = endings(tokens, tokenizer.eos_token_id)
    mean = (states * after[..., None]).sum(1) / after.sum(1, keepdim=True)
    return mean, states[torch.arange(len(texts)), after.float().argmax(1)]


if __name__ == "__main__":
    main()
