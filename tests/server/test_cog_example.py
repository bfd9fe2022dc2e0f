"""The Cog predictor of docs/examples: its signature is the schema's, and it paints."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from PIL import Image

from ritocco import Engine, PredictionInput

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "cog" / "predict.py"


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's class, with a stand-in for the package `cog`, which keeps what an Input is given."""
    cog: Any = types.ModuleType("cog")
    cog.BasePredictor = object
    cog.Path = type("Path", (type(Path()),), {})
    cog.Input = lambda **given: given
    monkeypatch.setitem(sys.modules, "cog", cog)
    spec = importlib.util.spec_from_file_location("cog_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Predictor


def test_the_signature_is_the_schemas(predictor: Any) -> None:
    schema = PredictionInput.model_json_schema()["properties"]
    named = inspect.signature(predictor.predict).parameters
    parameters = {name: one for name, one in named.items() if name != "self"}
    assert list(parameters) == sorted(schema, key=lambda name: schema[name]["x-order"])
    kinds = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Path": "string"}
    for name, parameter in parameters.items():
        field, given = schema[name], parameter.default
        kind = field.get("type") or field["anyOf"][0]["type"]
        # Cog takes a field for required unless its type may be None, whatever its default is.
        optional = [one for one in get_args(parameter.annotation) if one is not type(None)]
        assert bool(optional) == ("anyOf" in field), name
        annotation = optional[0] if optional else parameter.annotation
        assert kinds[annotation.__name__] == kind, name
        assert (annotation.__name__ == "Path") == (field.get("format") == "uri"), name
        assert given.get("default", "required") == field.get("default", "required"), name
        assert given.get("choices") == field.get("enum"), name
        assert (given.get("ge"), given.get("le")) == (field.get("minimum"), field.get("maximum")), name


def test_it_returns_files(predictor: Any, tiny_engine: Engine, ask: Any, tmp_path: Path) -> None:
    made, given = predictor(), ask()
    made.engine = tiny_engine
    for name in ("image", "mask"):
        given.pop(name).save(tmp_path / f"{name}.png")
        given[name] = sys.modules["cog"].Path(tmp_path / f"{name}.png")
    defaults = {
        name: parameter.default.get("default")
        for name, parameter in inspect.signature(predictor.predict).parameters.items()
        if name != "self"
    }
    files = made.predict(**defaults | given)
    annotation = inspect.signature(predictor.predict).return_annotation
    assert get_origin(annotation) is list
    assert all(isinstance(file, get_args(annotation)) for file in files)
    with Image.open(files[0]) as picture:
        assert picture.size == (64, 64)


def test_the_example_is_what_cog_is_told() -> None:
    text = (EXAMPLE.parent / "cog.yaml").read_text(encoding="utf-8")
    assert f'predict: "{EXAMPLE.name}:Predictor"' in text
