"""Offsets in one allocation: nothing that lives together overlaps, and nothing is smaller than it can be."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ritocco_export.arena import ALIGNMENT_BYTES, Lifetime, allocate, live_bytes

K = 1024


@st.composite
def lifetimes(draw: st.DrawFn) -> Lifetime:
    first = draw(st.integers(0, 12))
    return Lifetime(draw(st.integers(0, 5000)), first, first + draw(st.integers(0, 6)))


graphs = st.lists(lifetimes(), max_size=24).map(lambda found: {f"t{i}": one for i, one in enumerate(found)})


def together(one: Lifetime, other: Lifetime) -> bool:
    return any(step in range(other.first, other.last + 1) for step in range(one.first, one.last + 1))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(graphs)
def test_what_lives_together_lies_apart(tensors: dict[str, Lifetime]) -> None:
    arena = allocate(tensors)
    assert arena.offsets.keys() == tensors.keys()
    for name, one in tensors.items():
        start = arena.offsets[name]
        assert start % ALIGNMENT_BYTES == 0
        assert 0 <= start <= start + one.size <= max(arena.size, start if not one.size else 0)
        for other_name, other in tensors.items():
            if name < other_name and together(one, other) and one.size and other.size:
                other_start = arena.offsets[other_name]
                assert start + one.size <= other_start or other_start + other.size <= start


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(graphs)
def test_no_arena_is_smaller_than_what_lives_in_one_step(tensors: dict[str, Lifetime]) -> None:
    arena = allocate(tensors)
    live = [sum(one.size for one in tensors.values() if one.first <= t <= one.last) for t in range(20)]
    assert arena.lower_bound == max(live) <= arena.size
    assert not tensors or arena.busiest == live.index(max(live))
    assert (live_bytes(tensors) + 20 * [0])[:20] == live


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(graphs, st.randoms(use_true_random=False))
def test_the_order_in_which_tensors_are_named_changes_nothing(
    tensors: dict[str, Lifetime], chance: Random
) -> None:
    names = list(tensors)
    chance.shuffle(names)
    assert allocate({name: tensors[name] for name in names}) == allocate(tensors)


def test_a_chain_takes_two_places_in_turn() -> None:
    """No result is put where its own operand lies; the one before the last is gone."""
    chain = {f"t{step}": Lifetime(K, step, step + 1) for step in range(6)}
    arena = allocate(chain)
    assert arena.size == arena.lower_bound == 2 * K
    assert [arena.offsets[f"t{step}"] for step in range(6)] == [0, K, 0, K, 0, K]


def test_nothing_takes_nothing() -> None:
    arena = allocate({})
    assert (arena.size, arena.lower_bound, arena.offsets) == (0, 0, {})


def test_of_two_gaps_the_smaller_one_is_taken() -> None:
    """Behind three tensors that stay lie gaps of 4, 2 and no KiB where shorter ones ended."""
    tensors = {
        "a": Lifetime(9 * K, 0, 9),
        "wide": Lifetime(8 * K, 0, 1),
        "b": Lifetime(7 * K, 0, 9),
        "narrow": Lifetime(6 * K, 0, 1),
        "c": Lifetime(5 * K, 0, 9),
        "late": Lifetime(4 * K, 2, 9),
    }
    offsets = allocate(tensors).offsets
    assert offsets["late"] == offsets["narrow"] == 24 * K


# Alone, the one method takes 9 KiB where 8 do, the other 9 where 6 do.
WORSE_BY_SIZE = ((3, 0, 2), (2, 1, 3), (3, 2, 4), (4, 0, 0))
WORSE_BY_BREADTH = ((4, 3, 3), (3, 1, 1), (2, 1, 3), (1, 0, 1))


@pytest.mark.parametrize(("given", "least"), [(WORSE_BY_SIZE, 8), (WORSE_BY_BREADTH, 6)])
def test_the_smaller_of_two_arenas_is_taken(given: tuple[tuple[int, int, int], ...], least: int) -> None:
    arena = allocate(
        {f"t{i}": Lifetime(K * size, first, last) for i, (size, first, last) in enumerate(given)}
    )
    assert arena.size == arena.lower_bound == least * K


@pytest.mark.parametrize("wrong", [Lifetime(-1, 0, 1), Lifetime(8, 2, 1), Lifetime(8, -1, 1)])
def test_what_is_no_lifetime_is_refused(wrong: Lifetime) -> None:
    with pytest.raises(ValueError, match=r"^odd: "):
        allocate({"fine": Lifetime(8, 0, 1), "odd": wrong})
