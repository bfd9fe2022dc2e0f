"""The inputs as the schema has them, and what a person entered: no bound or name is written here twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from ritocco.errors import RequestError
from ritocco.schema import EXTENSIONS_KEY
from ritocco.shown import plain

Kind: TypeAlias = Literal["text", "integer", "number", "choice", "switch", "whole"]
PICTURES = ("image", "mask")
_STEPS_OF_A_RANGE = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One input. kind: `whole` is an integer without bounds, which is entered as text, since browsers round
    what is beyond 2**53. least, most, step: of numbers. optional: empty means None.
    """

    name: str
    label: str
    kind: Kind
    default: Any
    help: str
    least: float | None = None
    most: float | None = None
    step: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False


def fields_of(model: type[BaseModel]) -> tuple[Field, ...]:
    """The model's inputs but for the pictures, in the order of the original."""
    schema = model.model_json_schema()
    helps = _described(schema.get("description", ""))
    properties = sorted(schema["properties"].items(), key=lambda item: item[1].get("x-order", 0))
    return tuple(_field(name, one, helps.get(name, "")) for name, one in properties if name not in PICTURES)


def entered(fields: Sequence[Field], values: Sequence[Any]) -> dict[str, Any]:
    """The input's values of what stands in the controls. What is not checked here, the schema checks.

    Raises RequestError for a whole number that is none.
    """
    return {field.name: _entered(field, value) for field, value in zip(fields, values, strict=True)}


def changed(fields: Sequence[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is the default anyway."""
    defaults = {field.name: field.default for field in fields}
    return {name: value for name, value in given.items() if value != defaults[name]}


def as_input(given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The HTTP input of inputs and options that are not the defaults."""
    extensions = {EXTENSIONS_KEY: dict(options)} if options else {}
    return {**given, **extensions}


def _field(name: str, one: Mapping[str, Any], help: str) -> Field:
    kinds = [part for part in one.get("anyOf", (one,)) if part.get("type") != "null"]
    type_, choices = kinds[0].get("type"), tuple(kinds[0].get("enum", ()))
    optional = len(kinds) < len(one.get("anyOf", (one,)))
    least = kinds[0].get("minimum", kinds[0].get("exclusiveMinimum"))
    most = kinds[0].get("maximum")
    bounded = least is not None and most is not None
    step: float | None = None
    kind: Kind
    if choices:
        kind = "choice"
    elif type_ == "boolean":
        kind = "switch"
    elif type_ == "integer":
        kind, step = ("integer", 1) if bounded else ("whole", None)
    elif type_ == "number":
        kind, step = "number", _step(least, most) if bounded else None
        if step is not None and "exclusiveMinimum" in kinds[0]:
            least += step
    elif type_ == "string":
        kind = "text"
    else:
        raise TypeError(f"{name}: no control for {one!r}")
    return Field(
        name=name,
        label=name.replace("_", " ").capitalize(),
        kind=kind,
        default=one.get("default"),
        help=one.get("description") or help,
        least=least,
        most=most,
        step=step,
        choices=choices,
        optional=optional,
    )


def _step(least: float, most: float) -> float:
    """A round one, about a hundredth of the range."""
    rough = (most - least) / _STEPS_OF_A_RANGE
    return next((one for one in (0.01, 0.05, 0.1, 0.5, 1.0) if one >= rough), 1.0)


def _described(text: str) -> dict[str, str]:
    """What a model's docstring says of its fields: `name: words.`"""
    found = (line.partition(": ") for line in text.splitlines())
    return {name: words.capitalize() for name, colon, words in found if colon and name.isidentifier()}


def _entered(field: Field, value: Any) -> Any:
    if field.kind == "text" and field.optional:
        return value or None
    if field.kind != "whole":
        return value
    text = str(value if value is not None else "").strip()
    if not text:
        return field.default
    try:
        return int(text)
    except ValueError:
        rule = "it must be a whole number, or empty"
        raise RequestError(
            f"input.{field.name} is {plain(text)!r}; {rule}", field=f"input.{field.name}"
        ) from None
