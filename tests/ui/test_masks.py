"""Masks between the editor's layers and the model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ritocco import RequestError
from ritocco.images import load_inputs
from ritocco.pixels import Mask
from ritocco.sources import Loader
from ritocco.ui import masks

LOADER = Loader(allow_local=True)


def square(side: int = 40, first: int = 10, last: int = 20) -> Mask:
    mask = np.zeros((side, side), bool)
    mask[first:last, first:last] = True
    return mask


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_mask_goes_into_a_layer_and_out_of_it() -> None:
    layer = as_png(masks.layer_of(square()))
    found = masks.from_layers([layer], loader=LOADER)
    assert found is not None
    np.testing.assert_array_equal(found, square())


def test_layers_add_up_and_none_are_none() -> None:
    one, other = square(), square(first=25, last=30)
    found = masks.from_layers([as_png(masks.layer_of(m)) for m in (one, other)], loader=LOADER)
    assert found is not None
    np.testing.assert_array_equal(found, one | other)
    assert masks.from_layers([], loader=LOADER) is None
    with pytest.raises(RequestError, match=r"input\.mask: its layers differ in size"):
        masks.from_layers([as_png(masks.layer_of(square(side))) for side in (40, 48)], loader=LOADER)


@pytest.mark.parametrize(
    ("alpha", "white"), [(0, False), (127, False), (128, True), (178, True), (255, True)]
)
def test_paint_counts_where_it_is_half_white(alpha: int, white: bool) -> None:
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, alpha))
    found = masks.from_layers([as_png(layer)], loader=LOADER)
    assert found is not None
    assert found.all() == found.any() == white


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(RequestError, match=r"input\.mask: the content of 5 bytes is none of the formats"):
        masks.from_layers([b"hello"], loader=LOADER)


@pytest.mark.parametrize("pixels", [1, 3, 7.5])
def test_growing_takes_in_all_that_is_near(pixels: float) -> None:
    mask = square()
    found = masks.grown(mask, pixels)
    ys, xs = np.nonzero(mask)
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(40), indexing="ij"), axis=-1)
    distance = np.sqrt(((grid[:, :, None] - np.stack([ys, xs], axis=1)) ** 2).sum(-1)).min(-1)
    np.testing.assert_array_equal(found, distance <= pixels)


def test_growing_by_nothing_or_of_nothing_changes_nothing() -> None:
    np.testing.assert_array_equal(masks.grown(square(), 0), square())
    assert not masks.grown(np.zeros((8, 8), bool), 5).any()
    inside = np.asarray(Image.fromarray(square()).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
    assert not (masks.grown(square(), 1) & ~inside).any()


@pytest.mark.parametrize("pixels", [-1, 129, float("nan"), 10**400, True, None, "4", [4]])
def test_growing_has_bounds(pixels: Any) -> None:
    with pytest.raises(RequestError, match=r"grow is .*; it must be 0 to 128 pixels"):
        masks.grown(square(), pixels)


def test_resizing_is_the_librarys() -> None:
    rng = np.random.default_rng(3)
    mask = rng.random((50, 70)) < 0.5
    image = as_png(Image.new("RGB", (70, 50)))
    theirs = load_inputs(image, masks.png_of(mask), width=64, height=128, allow_local=True).mask
    np.testing.assert_array_equal(masks.resized(mask, 64, 128), theirs)


def test_the_file_is_black_and_white() -> None:
    made = Image.open(io.BytesIO(masks.png_of(square())))
    assert (made.mode, made.size) == ("1", (40, 40))
    np.testing.assert_array_equal(np.asarray(made), square())


@pytest.mark.parametrize("mask", [None, np.zeros((8, 8), bool)])
def test_an_empty_mask_is_refused(mask: Mask | None) -> None:
    with pytest.raises(RequestError, match=r"input\.mask is empty; paint over what is to change"):
        masks.refuse_empty(mask)
    assert masks.refuse_empty(square()).any()
