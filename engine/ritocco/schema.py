"""The wire contract of the input; `prediction.py` has that of the answer.

Twelve inputs with the names, types, defaults, bounds and enums of the model that this one stands in for. What
is ours and not the original's (`Options`) counts only under the key `ritocco` of the input, or as keyword
arguments of `predict`.

Types are strict, as the original's gateway checks them with JSON Schema: "25" and true are not integers. 25.0
is one, and an integer is a number. null for an optional field means its default.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from ritocco.errors import RequestError
from ritocco.shown import plain, shown

EXTENSIONS_KEY = "ritocco"
MAX_FEATHER_PX = 256

Side: TypeAlias = Literal[64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024]
SchedulerName: TypeAlias = Literal[
    "DDIM", "K_EULER", "DPMSolverMultistep", "K_EULER_ANCESTRAL", "PNDM", "KLMS"
]
OutputFormat: TypeAlias = Literal["png", "jpg", "webp"]

_M = TypeVar("_M", bound=BaseModel)
_JSON_NAMES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "boolean"),
    (str, "string"),
    (numbers.Integral, "integer"),
    (numbers.Real, "number"),
    (Mapping, "object"),
    ((list, tuple), "array"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """One broken rule, in the words of the HTTP answer's `invalid_fields`.

    type: `required`, `enum`, `number_gte`, `number_lte`, `invalid_type` or `additional_property_not_allowed`.
    field: `input.width`; for a missing field the object that lacks it, `input`, as the original writes it.
    """

    type: str
    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class InputError(RequestError):
    """The input breaks one or more rules of the schema.

    violations: all of them, in the order of the fields. The message and `field` speak of the first.
    """

    def __init__(self, message: str, *, field: str, violations: tuple[Violation, ...]) -> None:
        super().__init__(message, field=field)
        self.violations = violations


def type_error(expected: str, value: object) -> PydanticCustomError:
    """What a validator raises for a value of another JSON type than `expected`."""
    given = next((name for kind, name in _JSON_NAMES if isinstance(value, kind)), type(value).__name__)
    text = "Invalid type. Expected: {expected}, given: {given}"
    return PydanticCustomError("invalid_type", text, {"expected": expected, "given": given})


def _integer(value: object) -> int:
    """A JSON integer: 25 and 25.0, not true, not "25"."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise type_error("integer", value)


def _number(value: object) -> float:
    """A finite JSON number; not true, not "7.5"."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise PydanticCustomError("invalid_type", "Must be a finite number")
    raise type_error("number", value)


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise type_error("boolean", value)


def _string(value: object) -> str:
    """A text that UTF-8 can hold: JSON lets half of a surrogate pair through."""
    if not isinstance(value, str):
        raise type_error("string", value)
    if _storable(value) != value:
        raise PydanticCustomError("invalid_type", "Must be valid Unicode text")
    return value


def _storable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _seed(value: object) -> int:
    """What torch takes as a seed; a negative one stands for 2**64 + seed."""
    seed = _integer(value)
    if seed < -(2**63):
        raise PydanticCustomError("greater_than_equal", "", {"ge": -(2**63)})
    if seed >= 2**64:
        raise PydanticCustomError("less_than_equal", "", {"le": 2**64 - 1})
    return seed


def _source(value: object, info: ValidationInfo) -> object:
    """An image or mask: an http(s) URL or a data URI; anything where the context says `allow_local`."""
    if value is None:
        raise type_error("string", value)
    if info.context and info.context.get("allow_local"):
        return value
    text = _string(value)
    if not text[:8].lower().startswith(("http://", "https://", "data:")):
        raise PydanticCustomError("invalid_type", "Must be an http(s) URL or a data URI")
    return text


Integer = Annotated[int, BeforeValidator(_integer)]
Number = Annotated[float, BeforeValidator(_number)]
Boolean = Annotated[bool, BeforeValidator(_boolean)]
Text = Annotated[str, BeforeValidator(_string)]


def echo(value: object) -> Any:
    """The value as JSON can hold it, for a prediction's `input`.

    Texts (URLs and data URIs too), numbers, lists and mappings stay as they are; a path becomes its text, and
    what JSON has no form for a short placeholder: `<PIL image 640x480>`, `<array 480x640x3 uint8>`,
    `<12345 bytes>`, `<file bench.png>`, else `<type>`; so does what is nested deeper than 16 levels.
    """
    return _echo(value, 16)


def _echo(value: object, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _storable(value)
    if isinstance(value, numbers.Integral):
        whole = int(value)
        return whole if whole.bit_length() <= 1024 else f"<integer of {whole.bit_length()} bits>"
    if isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            return f"<{type(value).__name__}>"
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Mapping | list | tuple) and not levels:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        return {_storable(str(key)): _echo(one, levels - 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_echo(one, levels - 1) for one in value]
    if isinstance(value, os.PathLike):
        return _storable(os.fsdecode(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<array {'x'.join(str(side) for side in value.shape)} {value.dtype}>"
    if hasattr(value, "getexif") and hasattr(value, "width") and hasattr(value, "height"):
        return f"<PIL image {value.width}x{value.height}>"
    if hasattr(value, "read"):
        return f"<file {os.path.basename(str(getattr(value, 'name', 'in memory')))}>"  # noqa: PTH119 - may not be a path
    return f"<{type(value).__name__}>"


ImageSource = Annotated[
    Any,
    BeforeValidator(_source),
    PlainSerializer(echo, return_type=str),
    WithJsonSchema({"type": "string", "format": "uri"}),
]


def _order(place: int) -> dict[str, Any]:
    """`x-order` of the original, whose prompt comes first: clients take the first field as the prompt."""
    return {"x-order": place}


class PredictionInput(BaseModel):
    """The twelve inputs. Unknown keys are ignored, as the original does; `parse_input` names them."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)

    image: ImageSource = Field(
        description="The initial image. It is resized to height x width; the aspect ratio is not kept.",
        json_schema_extra=_order(2),
    )
    mask: ImageSource = Field(
        description="A black and white image: white pixels are repainted, black pixels are kept.",
        json_schema_extra=_order(3),
    )
    prompt: Text = Field(
        default="a vision of paradise. unreal engine",
        description="What to paint.",
        json_schema_extra=_order(0),
    )
    negative_prompt: Text | None = Field(
        default=None, description="What not to paint.", json_schema_extra=_order(1)
    )
    width: Annotated[Side, BeforeValidator(_integer)] = Field(
        default=512, description="Width of the output in pixels.", json_schema_extra=_order(4)
    )
    height: Annotated[Side, BeforeValidator(_integer)] = Field(
        default=512, description="Height of the output in pixels.", json_schema_extra=_order(5)
    )
    num_outputs: Integer = Field(
        default=1, ge=1, le=4, description="Number of images to make.", json_schema_extra=_order(6)
    )
    num_inference_steps: Integer = Field(
        default=50, ge=1, le=500, description="Number of denoising steps.", json_schema_extra=_order(7)
    )
    guidance_scale: Number = Field(
        default=7.5,
        ge=1,
        le=20,
        description="Scale of classifier-free guidance.",
        json_schema_extra=_order(8),
    )
    scheduler: Annotated[SchedulerName, BeforeValidator(_string)] = Field(
        default="DPMSolverMultistep", description="The scheduler.", json_schema_extra=_order(9)
    )
    seed: Annotated[int, BeforeValidator(_seed)] | None = Field(
        default=None, description="Seed of the noise; null for a random one.", json_schema_extra=_order(10)
    )
    disable_safety_checker: Boolean = Field(
        default=False, description="Skips the safety checker.", json_schema_extra=_order(11)
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        optional = {name for name, info in cls.model_fields.items() if not info.is_required()}
        return {key: value for key, value in data.items() if value is not None or key not in optional}


class Options(BaseModel):
    """What is ours: keyword arguments of `predict`, or the object under the input's key `ritocco`.

    output_format: of the files in `output`; jpg and webp are lossy, so bit-identity holds for png only.
    mask_feather: width in pixels of the soft seam on the white side of the mask, 0 to 256.
    paste_back: put the kept pixels back after decoding; without it the raw decode comes out.
    strength: the part of the schedule that is run, above 0 to 1; below 1 the start is the image plus noise.
    latents: the first noise, float [N,4,height/8,width/8], instead of our own. A keyword only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    output_format: Annotated[OutputFormat, BeforeValidator(_string)] = "png"
    mask_feather: Number = Field(default=0.0, ge=0, le=MAX_FEATHER_PX)
    paste_back: Boolean = True
    strength: Number = Field(default=1.0, gt=0, le=1)
    latents: SkipJsonSchema[Any] = Field(default=None, exclude=True, repr=False)

    def override(self, **keywords: Any) -> Options:
        """These options with the keywords that are not None put over them; raises InputError."""
        given = {name: value for name, value in keywords.items() if value is not None}
        return validated(Options, {**self.model_dump(), "latents": self.latents, **given}, prefix="")


def parse_input(
    mapping: Mapping[str, Any], *, allow_local: bool
) -> tuple[PredictionInput, Options | None, tuple[str, ...]]:
    """Checks an input: the twelve fields, our options where the key `ritocco` holds some. Names ignored keys.

    allow_local: image and mask may also be paths, PIL images, arrays, bytes and open files; servers say
        False, and then only http(s) URLs and data URIs pass.
    Raises InputError, which names field, value and rule of the first violation and lists all.
    """
    if not isinstance(mapping, Mapping):
        description = str(type_error("object", mapping))
        violation = Violation(type="invalid_type", field="input", description=description)
        raise InputError(f"input: {description}", field="input", violations=(violation,))
    context = {"allow_local": allow_local}
    problems: list[InputError] = []
    parsed: PredictionInput | None = None
    options: Options | None = None
    try:
        parsed = validated(PredictionInput, mapping, prefix="input", context=context)
    except InputError as error:
        problems.append(error)
    extensions = mapping.get(EXTENSIONS_KEY)
    if extensions is not None:
        try:
            options = _options(extensions)
        except InputError as error:
            problems.append(error)
    if problems or parsed is None:
        everything = tuple(violation for problem in problems for violation in problem.violations)
        raise InputError(str(problems[0]), field=problems[0].field, violations=everything)
    known = {*PredictionInput.model_fields, EXTENSIONS_KEY}
    return parsed, options, tuple(str(key) for key in mapping if key not in known)


def _options(extensions: object) -> Options:
    field = f"input.{EXTENSIONS_KEY}"
    if not isinstance(extensions, Mapping):
        description = str(type_error("object", extensions))
        violation = Violation(type="invalid_type", field=field, description=description)
        raise InputError(f"{field}: {description}", field=field, violations=(violation,))
    if "latents" in extensions:
        description = "Additional property latents is not allowed"
        violation = Violation(type="additional_property_not_allowed", field=field, description=description)
        text = f"{field}.latents is a keyword argument of predict() and can't be given in the input"
        raise InputError(text, field=f"{field}.latents", violations=(violation,))
    given = {
        key: value
        for key, value in extensions.items()
        if value is not None or key not in Options.model_fields
    }
    return validated(Options, given, prefix=field)


def validated(model: type[_M], data: Any, *, prefix: str, context: Any = None) -> _M:
    """A model of data, or an InputError that lists every violation. prefix: of the fields' names."""
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        details = error.errors(include_url=False)
        violations = tuple(_violation(detail, prefix, model) for detail in details)
        first = details[0]
        field = _dotted(prefix, _name(first))
        rule = violations[0].description
        text = (
            f"{field} is required"
            if first["type"] == "missing"
            else f"{field} is {_short(first['input'])}. {rule}"
        )
        raise InputError(text, field=field, violations=violations) from error


def _violation(detail: ErrorDetails, prefix: str, model: type[BaseModel]) -> Violation:
    kind, name, bounds = detail["type"], _name(detail), detail.get("ctx", {})
    here = _dotted(prefix, name)
    if kind == "missing":
        return Violation(type="required", field=prefix, description=f"{name} is required")
    if kind == "extra_forbidden":
        description = f"Additional property {name} is not allowed"
        return Violation(
            type="additional_property_not_allowed", field=prefix or name, description=description
        )
    if kind in (
        "literal_error",
        "int_parsing_size",
    ):  # the latter: a choice of integers, and one over 64 bits
        choices = get_args(model.model_fields[name].annotation)
        listed = ", ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in choices)
        return Violation(
            type="enum", field=here, description=f"{name} must be one of the following: {listed}"
        )
    for bound, wire, words in (
        ("ge", "number_gte", "greater than or equal to"),
        ("gt", "number_gte", "greater than"),
        ("le", "number_lte", "less than or equal to"),
    ):
        if bound in bounds:
            limit = bounds[bound]
            shown = f"{limit:g}" if isinstance(limit, float) else str(limit)
            return Violation(type=wire, field=here, description=f"Must be {words} {shown}")
    return Violation(type="invalid_type", field=here, description=detail["msg"])


def _name(detail: ErrorDetails) -> str:
    return plain(str(detail["loc"][0])) if detail["loc"] else ""


def _dotted(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _short(value: object) -> str:
    if isinstance(value, str):
        text = ascii(value[:60])
    elif isinstance(value, Mapping | list | tuple | numbers.Number):
        text = shown(value)
    else:
        text = ascii(echo(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
