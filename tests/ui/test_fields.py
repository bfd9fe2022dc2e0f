"""The controls are the schema's: another bound makes another page."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field as Bound

from ritocco import RequestError
from ritocco.schema import Options, PredictionInput, parse_input
from ritocco.ui.fields import Field, as_input, changed, entered, fields_of


def by_name(model: Any) -> dict[str, Field]:
    return {field.name: field for field in fields_of(model)}


def test_every_input_but_the_pictures_has_a_control_in_the_originals_order() -> None:
    names = [field.name for field in fields_of(PredictionInput)]
    orders: dict[str, Any] = {}
    for name, info in PredictionInput.model_fields.items():
        extra: Any = info.json_schema_extra
        orders[name] = extra["x-order"]
    assert names == sorted(set(orders) - {"image", "mask"}, key=lambda name: orders[name])
    assert {field.name for field in fields_of(Options)} == set(Options.model_fields) - {"latents"}
    assert all(field.help for model in (PredictionInput, Options) for field in fields_of(model))


def test_bounds_defaults_and_choices_are_the_schemas() -> None:
    found = by_name(PredictionInput)
    steps, guidance, side = found["num_inference_steps"], found["guidance_scale"], found["width"]
    assert (steps.kind, steps.least, steps.most, steps.step, steps.default) == ("integer", 1, 500, 1, 50)
    assert (guidance.kind, guidance.least, guidance.most, guidance.default) == ("number", 1, 20, 7.5)
    assert (side.kind, side.choices[0], side.choices[-1], side.default) == ("choice", 64, 1024, 512)
    assert found["scheduler"].choices[0] == "DDIM"
    assert (found["seed"].kind, found["seed"].default) == ("whole", None)
    assert found["negative_prompt"].optional
    strength = by_name(Options)["strength"]
    assert strength.least is not None
    assert 0 < strength.least <= 0.01


def test_another_bound_makes_another_control() -> None:
    class Other(PredictionInput):
        num_inference_steps: int = Bound(default=9, ge=2, le=30, description="Other.")
        scheduler: Literal["DDIM", "NEW"] = "NEW"  # type: ignore[assignment]

    found = by_name(Other)
    steps = found["num_inference_steps"]
    assert (steps.least, steps.most, steps.default, steps.help) == (2, 30, 9, "Other.")
    assert (found["scheduler"].choices, found["scheduler"].default) == (("DDIM", "NEW"), "NEW")


def test_a_kind_without_control_is_an_error() -> None:
    class Odd(PredictionInput):
        odd: list[int] = []  # noqa: RUF012 - pydantic copies it

    with pytest.raises(TypeError, match="odd: no control"):
        fields_of(Odd)


def test_defaults_are_a_valid_input() -> None:
    fields, options = fields_of(PredictionInput), fields_of(Options)
    given = entered(fields, [field.default for field in fields])
    extra = entered(options, [field.default for field in options])
    pictures = {"image": "data:,", "mask": "data:,"}
    parsed, more, ignored = parse_input({**pictures, **given, "ritocco": extra}, allow_local=False)
    assert parsed == PredictionInput(**pictures)
    assert more == Options()
    assert not ignored
    assert not changed(options, extra)
    assert as_input({"seed": 1}, {}) == {"seed": 1}
    assert as_input({"seed": 1}, {"strength": 0.5}) == {"seed": 1, "ritocco": {"strength": 0.5}}


@pytest.mark.parametrize(
    ("text", "seed"), [("", None), (None, None), (" 7 ", 7), ("-3", -3), (str(2**64 - 1), 2**64 - 1)]
)
def test_seeds_are_whole_and_not_rounded(text: Any, seed: int | None) -> None:
    field = by_name(PredictionInput)["seed"]
    assert entered([field], [text]) == {"seed": seed}


@pytest.mark.parametrize("text", ["1.5", "x", "0x10", "1e3", "<b>"])
def test_a_seed_that_is_none_is_refused(text: str) -> None:
    field = by_name(PredictionInput)["seed"]
    with pytest.raises(RequestError, match=rf"input\.seed is '{text}'; it must be a whole number, or empty"):
        entered([field], [text])
