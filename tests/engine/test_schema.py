"""The wire contract, field by field, and what a request's mistakes come back as."""

from __future__ import annotations

import io
import json
import pathlib
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ritocco.errors import RequestError
from ritocco.schema import (
    InputError,
    Options,
    PredictionInput,
    echo,
    parse_input,
)

URL = "https://example.org/a.png"
GOOD: dict[str, Any] = {"image": URL, "mask": "data:image/png;base64,AAAA"}
SIDES = list(range(64, 1025, 64))
SCHEDULERS = ["DDIM", "K_EULER", "DPMSolverMultistep", "K_EULER_ANCESTRAL", "PNDM", "KLMS"]
NULL = {"type": "null"}

# The contract's table, in its order: what the JSON schema says of each field, descriptions and titles aside.
CONTRACT: dict[str, dict[str, Any]] = {
    "image": {"type": "string", "format": "uri", "x-order": 2},
    "mask": {"type": "string", "format": "uri", "x-order": 3},
    "prompt": {"type": "string", "default": "a vision of paradise. unreal engine", "x-order": 0},
    "negative_prompt": {"anyOf": [{"type": "string"}, NULL], "default": None, "x-order": 1},
    "width": {"type": "integer", "default": 512, "enum": SIDES, "x-order": 4},
    "height": {"type": "integer", "default": 512, "enum": SIDES, "x-order": 5},
    "num_outputs": {"type": "integer", "default": 1, "minimum": 1, "maximum": 4, "x-order": 6},
    "num_inference_steps": {"type": "integer", "default": 50, "minimum": 1, "maximum": 500, "x-order": 7},
    "guidance_scale": {"type": "number", "default": 7.5, "minimum": 1, "maximum": 20, "x-order": 8},
    "scheduler": {"type": "string", "default": "DPMSolverMultistep", "enum": SCHEDULERS, "x-order": 9},
    "seed": {"anyOf": [{"type": "integer"}, NULL], "default": None, "x-order": 10},
    "disable_safety_checker": {"type": "boolean", "default": False, "x-order": 11},
}


def refused(allow_local: bool = False, /, **changes: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        parse_input({**GOOD, **changes}, allow_local=allow_local)
    return caught.value


def test_json_schema_is_the_contract() -> None:
    schema = PredictionInput.model_json_schema()
    found = {
        name: {key: value for key, value in entry.items() if key not in ("title", "description")}
        for name, entry in schema["properties"].items()
    }
    assert found == CONTRACT
    assert list(found) == list(CONTRACT)
    assert schema["required"] == ["image", "mask"]
    assert PredictionInput.model_json_schema(mode="serialization")["properties"] == schema["properties"]


def test_defaults_are_what_the_schema_says() -> None:
    parsed, options, ignored = parse_input(GOOD, allow_local=False)
    for name, entry in CONTRACT.items():
        if "default" in entry:
            assert getattr(parsed, name) == entry["default"]
    assert options is None
    assert ignored == ()


def test_null_means_default_and_is_no_image() -> None:
    nulls = {name: None for name, entry in CONTRACT.items() if "default" in entry}
    assert parse_input({**GOOD, **nulls}, allow_local=False)[0] == parse_input(GOOD, allow_local=False)[0]
    problem = refused(image=None).violations[0]
    assert (problem.type, problem.field) == ("invalid_type", "input.image")


def test_unknown_keys_are_ignored_and_named() -> None:
    sent: dict[Any, Any] = {**GOOD, "strength": 0.5, "size": "512x512", "aspect_ratio": None, 7: "x"}
    parsed, options, ignored = parse_input(sent, allow_local=False)
    assert ignored == ("strength", "size", "aspect_ratio", "7")
    assert options is None
    assert parsed == parse_input(GOOD, allow_local=False)[0]


@pytest.mark.parametrize(
    ("field", "value", "kind", "rule"),
    [
        ("width", 100, "enum", "width must be one of the following: 64, 128"),
        ("height", 0, "enum", "must be one of"),
        ("height", 1088, "enum", "must be one of"),
        ("width", 10**30, "enum", "must be one of"),
        ("num_outputs", 10**30, "number_lte", "Must be less than or equal to 4"),
        ("width", "512", "invalid_type", "Invalid type. Expected: integer, given: string"),
        ("width", True, "invalid_type", "given: boolean"),
        ("width", 512.5, "invalid_type", "given: number"),
        ("num_outputs", 0, "number_gte", "Must be greater than or equal to 1"),
        ("num_outputs", 5, "number_lte", "Must be less than or equal to 4"),
        ("num_inference_steps", 501, "number_lte", "Must be less than or equal to 500"),
        ("num_inference_steps", "25", "invalid_type", "given: string"),
        ("num_inference_steps", [25], "invalid_type", "given: array"),
        ("num_inference_steps", {}, "invalid_type", "given: object"),
        ("guidance_scale", 0.99, "number_gte", "Must be greater than or equal to 1"),
        ("guidance_scale", 20.01, "number_lte", "Must be less than or equal to 20"),
        ("guidance_scale", True, "invalid_type", "Expected: number, given: boolean"),
        ("guidance_scale", float("nan"), "invalid_type", "finite"),
        ("guidance_scale", float("inf"), "invalid_type", "finite"),
        ("guidance_scale", 10**400, "invalid_type", "finite"),
        ("scheduler", "ddim", "enum", '"DDIM", "K_EULER"'),
        ("scheduler", 1, "invalid_type", "Expected: string, given: integer"),
        ("prompt", 5, "invalid_type", "Expected: string, given: integer"),
        ("prompt", "\ud800", "invalid_type", "Unicode"),
        ("negative_prompt", ["x"], "invalid_type", "given: array"),
        ("seed", "7", "invalid_type", "Expected: integer, given: string"),
        ("seed", False, "invalid_type", "given: boolean"),
        ("seed", 2**64, "number_lte", "18446744073709551615"),
        ("seed", -(2**63) - 1, "number_gte", "-9223372036854775808"),
        ("disable_safety_checker", 1, "invalid_type", "Expected: boolean, given: integer"),
        ("disable_safety_checker", "true", "invalid_type", "given: string"),
        ("image", "/etc/passwd", "invalid_type", "http(s) URL or a data URI"),
        ("mask", "file:///etc/passwd", "invalid_type", "http(s) URL or a data URI"),
        ("image", b"bytes", "invalid_type", "Expected: string"),
        ("mask", pathlib.Path("mask.png"), "invalid_type", "Expected: string"),
    ],
)
def test_violations_name_field_value_and_rule(field: str, value: Any, kind: str, rule: str) -> None:
    error = refused(**{field: value})
    assert error.field == f"input.{field}"
    assert [(one.type, one.field) for one in error.violations] == [(kind, f"input.{field}")]
    assert rule in error.violations[0].description
    shown = ascii(value) if isinstance(value, str | int) and len(ascii(value)) < 50 else ""
    assert f"input.{field}" in str(error)
    assert shown in str(error)
    assert rule in str(error)
    assert isinstance(error, RequestError)


def test_missing_fields_read_as_the_original_writes_them() -> None:
    with pytest.raises(InputError) as caught:
        parse_input({"prompt": "x", "num_outputs": 9}, allow_local=False)
    assert [(one.type, str(one)) for one in caught.value.violations] == [
        ("required", "input: image is required"),
        ("required", "input: mask is required"),
        ("number_lte", "input.num_outputs: Must be less than or equal to 4"),
    ]
    assert caught.value.field == "input.image"


@pytest.mark.parametrize("sent", [None, [], "x", 7])
def test_input_must_be_an_object(sent: Any) -> None:
    with pytest.raises(InputError, match="Expected: object") as caught:
        parse_input(sent, allow_local=True)
    assert caught.value.field == "input"


@pytest.mark.parametrize(("sent", "meant"), [(25.0, 25), (np.int64(25), 25), (25, 25)])
def test_integral_numbers_are_integers(sent: Any, meant: int) -> None:
    parsed, _, _ = parse_input({**GOOD, "num_inference_steps": sent, "guidance_scale": 3}, allow_local=False)
    assert parsed.num_inference_steps == meant
    assert type(parsed.num_inference_steps) is int
    assert type(parsed.guidance_scale) is float


@pytest.mark.parametrize("seed", [0, -1, 65535, 2**64 - 1])
def test_seeds_are_kept(seed: int) -> None:
    assert parse_input({**GOOD, "seed": seed}, allow_local=False)[0].seed == seed


def test_local_sources_pass_only_where_allowed() -> None:
    picture = Image.new("RGB", (4, 3))
    for source in ("bench.png", pathlib.Path("bench.png"), picture, np.zeros((3, 4)), b"x", io.BytesIO(b"x")):
        parsed, _, _ = parse_input({"image": source, "mask": source}, allow_local=True)
        assert parsed.image is source
        refused(image=source)


def test_options_count_only_under_their_key() -> None:
    sent = {"output_format": "webp", "mask_feather": 4, "paste_back": False, "strength": 0.5}
    parsed, options, ignored = parse_input({**GOOD, "ritocco": sent, "strength": 0.1}, allow_local=False)
    assert options == Options(output_format="webp", mask_feather=4.0, paste_back=False, strength=0.5)
    assert ignored == ("strength",)
    assert "ritocco" not in parsed.model_dump()
    assert parse_input({**GOOD, "ritocco": {"strength": None}}, allow_local=False)[1] == Options()


@pytest.mark.parametrize(
    ("sent", "field", "kind"),
    [
        ({"feather": 3}, "input.ritocco.feather", "additional_property_not_allowed"),
        ({"feather": None}, "input.ritocco.feather", "additional_property_not_allowed"),
        ({"latents": [1.0]}, "input.ritocco.latents", "additional_property_not_allowed"),
        ({"strength": 0}, "input.ritocco.strength", "number_gte"),
        ({"strength": 1.01}, "input.ritocco.strength", "number_lte"),
        ({"mask_feather": -1}, "input.ritocco.mask_feather", "number_gte"),
        ({"mask_feather": 257}, "input.ritocco.mask_feather", "number_lte"),
        ({"output_format": "gif"}, "input.ritocco.output_format", "enum"),
        ({"paste_back": 1}, "input.ritocco.paste_back", "invalid_type"),
        ([], "input.ritocco", "invalid_type"),
    ],
)
def test_options_are_checked(sent: Any, field: str, kind: str) -> None:
    error = refused(ritocco=sent)
    assert error.field == field
    assert error.violations[0].type == kind
    assert field in str(error)


def test_violations_of_input_and_options_come_together() -> None:
    error = refused(width=1, ritocco={"strength": 3})
    assert [one.field for one in error.violations] == ["input.width", "input.ritocco.strength"]


def test_keywords_override_options() -> None:
    latents = np.zeros((1, 4, 8, 8), dtype=np.float32)
    options = Options(strength=0.5, output_format="jpg").override(
        strength=0.25, mask_feather=None, latents=latents
    )
    assert (options.strength, options.output_format, options.mask_feather) == (0.25, "jpg", 0.0)
    assert options.latents is latents
    assert options.override(paste_back=False).latents is latents
    assert "latents" not in options.model_dump()
    with pytest.raises(InputError, match=r"strength is 3\.0") as caught:
        options.override(strength=3)
    assert caught.value.field == "strength"


def test_parsed_input_serialises() -> None:
    parsed, _, _ = parse_input({"image": Image.new("L", (3, 2)), "mask": b"12"}, allow_local=True)
    dumped = json.loads(parsed.model_dump_json())
    assert dumped["image"] == "<PIL image 3x2>"
    assert dumped["mask"] == "<2 bytes>"


def test_echo_names_an_open_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bench.png"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        assert echo(file) == "<file bench.png>"


def test_long_values_are_cut_in_messages() -> None:
    error = refused(image="x" * 1_000_000)
    assert len(str(error)) < 300


def test_importing_the_schema_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "diffusers", "httpx")
    code = f"import sys, ritocco.schema; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "field", ["num_inference_steps", "image", "prompt", "seed", "disable_safety_checker"]
)
@pytest.mark.parametrize(
    "value",
    [nested(900), {"a": nested(900)}, 10**5000, Fraction(10**400)],
    ids=["list", "object", "integer", "fraction"],
)
def test_values_of_any_depth_and_size_are_named_shortly(field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        parse_input({**GOOD, field: value}, allow_local=False)
    assert caught.value.field == f"input.{field}"
    assert len(str(caught.value)) < 300
    assert isinstance(json.dumps(echo(value)), str)


@pytest.mark.parametrize("key", ["a\nFAKE LOG \x1b[31m", "x" * 10**6, "\u202e"])
def test_keys_cannot_forge_lines(key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_input({**GOOD, "ritocco": {key: 1}}, allow_local=False)
    for text in (str(caught.value), caught.value.field, *map(str, caught.value.violations)):
        assert text.isascii()
        assert text.isprintable()
        assert len(text) < 300
