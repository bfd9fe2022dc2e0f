"""Noise as a function: the published vectors of Philox, Triton's conventions, independence, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ritocco.errors import RequestError
from ritocco.noise import normal, philox, uniform

# Random123's tests/kat_vectors, the three lines "philox4x32 10": counter, key (low word first), output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# Elements 0 to 3 of draw 0 of seed 7, and of draw 3 of the last seed.
FIRST_OF_SEED_7 = [-2.190445, -0.540578, 2.953244, -0.704202]
FIRST_OF_LAST_SEED = [0.419502, 0.111808, -0.00939, 0.958887]


def words(*values: int) -> list[Any]:
    return [np.array([value], dtype=np.uint32) for value in values]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = words(*counter)
    drawn = philox(key[0] | key[1] << 32, c0, c1, c2, c3)
    assert tuple(int(word[0]) for word in drawn) == expected


def test_philox_leaves_its_counters_alone() -> None:
    counters = words(1, 2, 3, 4)
    philox(5, counters[0], counters[1], counters[2], counters[3])
    assert [int(c[0]) for c in counters] == [1, 2, 3, 4]


def test_uniforms_fold_negative_words_and_stay_below_one() -> None:
    extremes = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], dtype=np.uint32)
    drawn = uniform(extremes)
    assert drawn.dtype == np.float32
    # -2**31 folds to 2**31 - 1, -1 folds to 0.
    assert drawn[0] == drawn[4] == 0.0
    assert drawn[2] == drawn[3] < 1.0
    assert drawn[1] == np.float32(4.6566127342e-10)


def scalar_randn(seed: int, index: int, draw: int) -> float:
    """Triton's `randn` for one element, in plain integers and floats."""
    c, k = [index, draw, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (high >> 32) ^ c[1] ^ k[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ c[3] ^ k[1],
            low & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    signed = [word - (1 << 32) if word >> 31 else word for word in c[:2]]
    u1, u2 = (float(-x - 1 if x < 0 else x) * 4.6566127342e-10 for x in signed)
    return math.sqrt(-2.0 * math.log(max(u1, 1e-7))) * math.cos(2.0 * math.pi * u2)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 + 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("draw", [0, 3])
def test_normal_is_tritons_randn(seed: int, draw: int) -> None:
    drawn = normal(seed, draw, (2, 3, 4))
    expected = np.array([scalar_randn(seed, index, draw) for index in range(24)]).reshape(2, 3, 4)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=2e-6)


def test_vectors_that_the_step_kernels_are_held_to() -> None:
    first = normal(7, 0, (4,))
    np.testing.assert_allclose(first, FIRST_OF_SEED_7, rtol=0, atol=1e-6)
    np.testing.assert_allclose(normal(2**64 - 1, 3, (4,)), FIRST_OF_LAST_SEED, rtol=0, atol=1e-6)


def test_moments_and_tails_are_those_of_a_standard_normal() -> None:
    drawn = normal(11, 0, (1 << 20,)).astype(np.float64)
    assert abs(drawn.mean()) < 4e-3
    assert abs(drawn.std() - 1.0) < 3e-3
    assert abs((drawn**3).mean()) < 1e-2
    assert abs((drawn**4).mean() - 3.0) < 3e-2
    assert abs((np.abs(drawn) > 3.0).mean() - 0.0027) < 3e-4
    assert np.isfinite(drawn).all()
    assert np.abs(drawn).max() < math.sqrt(-2.0 * math.log(1e-7))


@pytest.mark.parametrize(
    "other", [(12, 0), (11, 1), (11, 2**32 - 1), (11 + 2**32, 0)], ids=["seed", "draw", "last draw", "high"]
)
def test_other_seeds_and_draws_are_independent(other: tuple[int, int]) -> None:
    here, there = normal(11, 0, (4, 64, 64)).ravel(), normal(*other, (4, 64, 64)).ravel()
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.04
    assert np.mean(here == there) < 1e-3
    # Neither is the other one shifted, as streams that overlap would be.
    assert abs(np.corrcoef(here[1:], there[:-1])[0, 1]) < 0.04


def test_neighbours_are_independent() -> None:
    drawn = normal(11, 0, (4, 64, 64)).ravel()
    for lag in (1, 2, 64, 4096):
        assert abs(np.corrcoef(drawn[lag:], drawn[:-lag])[0, 1]) < 0.04


def test_an_element_depends_on_its_flat_index_alone() -> None:
    assert np.array_equal(normal(5, 2, (4, 8, 8)).ravel(), normal(5, 2, (256,)))
    assert np.array_equal(normal(5, 2, (256,))[:100], normal(5, 2, (100,)))
    assert normal(5, 2, ()).shape == ()
    assert normal(5, 2, (0, 4)).shape == (0, 4)


def test_numpy_integers_are_welcome() -> None:
    assert np.array_equal(normal(int(np.uint64(2**64 - 1)), 0, (3,)), normal(2**64 - 1, 0, (3,)))
    seed: Any = np.uint64(2**64 - 1)
    assert np.array_equal(normal(seed, 0, (3,)), normal(2**64 - 1, 0, (3,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "7", None])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    with pytest.raises(RequestError, match="seed is") as caught:
        normal(seed, 0, (1,))
    assert caught.value.field == "input.seed"
    assert repr(seed) in str(caught.value)


@pytest.mark.parametrize("draw", [-1, 2**32, 0.5])
def test_a_draw_out_of_range_is_refused(draw: Any) -> None:
    with pytest.raises(RequestError, match="draw is"):
        normal(0, draw, (1,))


@pytest.mark.parametrize("shape", [(2**17, 2**17), (-1, 2)])
def test_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="shape is"):
        normal(0, 0, shape)
