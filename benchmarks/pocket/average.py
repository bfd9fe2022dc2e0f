"""The average of two sets of weights of one network: `python -m pocket.average OLD NEW OUT --share 0.25`.

Weights of one run of training, a few hundred steps apart, can be averaged: the average keeps most of what
either is better at. [Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def average(old: Path, new: Path, out: Path, *, share: float) -> None:
    """Write a safetensors file of (1 - share) * old + share * new, in the dtype of `new`.

    Raises ValueError where names, shapes or the share don't fit.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be from 0 to 1")
    first, second = load_file(old), load_file(new)
    if {name: one.shape for name, one in first.items()} != {name: one.shape for name, one in second.items()}:
        raise ValueError(f"{old} and {new} hold other tensors")
    with safe_open(new, "pt") as file:
        about = file.metadata()
    mixed = {name: torch.lerp(first[name].float(), one.float(), share) for name, one in second.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.to(second[name].dtype) for name, one in mixed.items()}, out, metadata=about)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of NEW, 0 to 1")
    arguments = parser.parse_args()
    average(arguments.old, arguments.new, arguments.out, share=arguments.share)


if __name__ == "__main__":
    main()
