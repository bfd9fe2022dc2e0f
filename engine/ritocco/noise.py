"""The only source of randomness: noise is a function of (seed, draw, element).

Counter-based, so there is no generator state: Philox 4x32-10 [Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"] followed by Box-Muller, with the conventions of Triton's `tl.philox` and `tl.randn`,
which the step kernel computes on a GPU.
"""

from __future__ import annotations

import math
import operator

import numpy as np
import numpy.typing as npt

from ritocco.errors import RequestError

UINT32_END = 1 << 32
UINT64_END = 1 << 64

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_2 = np.uint64(0xCD9E8D57)
_KEY_STEP_LOW = 0x9E3779B9
_KEY_STEP_HIGH = 0xBB67AE85
_ROUNDS = 10

# Triton's scale: the largest float32 for which (2**31 - 1) * scale stays below 1.
_UNIFORM_SCALE = np.float32(4.6566127342e-10)
_SMALLEST_UNIFORM = np.float32(1.0e-7)
_TWO_PI = np.float32(2.0 * math.pi)


def philox(
    seed: int,
    c0: npt.NDArray[np.uint32],
    c1: npt.NDArray[np.uint32],
    c2: npt.NDArray[np.uint32],
    c3: npt.NDArray[np.uint32],
) -> tuple[npt.NDArray[np.uint32], ...]:
    """Philox 4x32-10: four words of noise for each four-word counter. `tl.philox` in Triton.

    seed: the 64-bit key, low word first. c0..c3: uint32, shapes that broadcast. Returns four uint32 arrays of
    the broadcast shape.
    """
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    words = [np.array(np.broadcast_to(c, shape), dtype=np.uint64) for c in (c0, c1, c2, c3)]
    w0, w1, w2, w3 = words
    product_0, product_2 = np.empty_like(w0), np.empty_like(w0)
    key_low, key_high = seed % UINT32_END, seed >> 32
    for _ in range(_ROUNDS):
        np.multiply(w0, _MULTIPLIER_0, out=product_0)
        np.multiply(w2, _MULTIPLIER_2, out=product_2)
        np.right_shift(product_2, _SHIFT, out=w0)
        w0 ^= w1
        w0 ^= np.uint64(key_low)
        np.right_shift(product_0, _SHIFT, out=w2)
        w2 ^= w3
        w2 ^= np.uint64(key_high)
        np.bitwise_and(product_2, _LOW, out=w1)
        np.bitwise_and(product_0, _LOW, out=w3)
        key_low = (key_low + _KEY_STEP_LOW) % UINT32_END
        key_high = (key_high + _KEY_STEP_HIGH) % UINT32_END
    return tuple(word.astype(np.uint32) for word in words)


def uniform(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Random words as float32 in [0, 1): signed, negatives folded (-x - 1). `tl.uint_to_uniform_float`."""
    signed = words.view(np.int32)
    folded = np.where(signed < 0, ~signed, signed)
    return folded.astype(np.float32) * _UNIFORM_SCALE


def normal(seed: int, draw: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise: the same numbers for the same (seed, draw, flat index), at any shape and batch
    size.

    seed: 0 .. 2**64 - 1. draw: 0 .. 2**32 - 1; 0 is the initial latent, k is the noise of table row k.
    shape: at most 2**32 elements. Returns float32 of that shape.

    Element i takes Philox words 0 and 1 of counter (i, draw, 0, 0), so draw 0 is Triton's `tl.randn(seed,
    i)`, and draw k is `tl.randn(seed, (k << 32) | i)` where Triton takes 64-bit offsets. Logarithm and cosine
    are taken in float64 and rounded once, so that processors agree with each other; a GPU's float32 ones
    agree to about 1e-6.

    Raises RequestError where seed or draw is out of range.
    """
    seed = _integer(seed, "seed", UINT64_END, field="input.seed")
    draw = _integer(draw, "draw", UINT32_END, field="")
    count = math.prod(shape)
    if count > UINT32_END or any(side < 0 for side in shape):
        raise RequestError(
            f"shape is {shape}; sides are 0 or more, and at most 2**32 elements are drawn at once"
        )
    zero = np.zeros(1, dtype=np.uint32)
    index = np.arange(count, dtype=np.uint32)
    word_0, word_1, _, _ = philox(seed, index, np.full(1, draw, dtype=np.uint32), zero, zero)
    u1 = np.maximum(uniform(word_0), _SMALLEST_UNIFORM)
    angle = uniform(word_1) * _TWO_PI
    radius = np.sqrt(-2.0 * np.log(u1, dtype=np.float64))
    drawn: npt.NDArray[np.float32] = (radius * np.cos(angle, dtype=np.float64)).astype(np.float32)
    return drawn.reshape(shape)


def _integer(value: int, name: str, end: int, *, field: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise RequestError(f"{name} is {value!r}; it is a whole number", field=field) from error
    if isinstance(value, bool) or not 0 <= number < end:
        raise RequestError(f"{name} is {value!r}; it is a whole number from 0 to {end - 1}", field=field)
    return number
