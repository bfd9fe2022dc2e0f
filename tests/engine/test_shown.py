"""Values in messages stay on one line, in ASCII, and short."""

from __future__ import annotations

from typing import Any

import pytest

from ritocco.shown import plain, printable, said, shown


class Rude:
    def __repr__(self) -> str:
        raise KeyError("no")


class Loud:
    def __repr__(self) -> str:
        return "a\nb\x1b[31m" * 100


def deep() -> Any:
    value: Any = []
    for _ in range(2000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, 10**5000, Rude(), Loud(), deep(), {str(i): i for i in range(99)}, "\n\x1b\u202e"],
    ids=["text", "integer", "rude", "loud", "deep", "wide", "controls"],
)
def test_one_short_plain_line(value: object) -> None:
    text = shown(value)
    assert text.isascii()
    assert text.isprintable()
    assert 0 < len(text) <= 480


def test_ordinary_values_read_as_python_writes_them() -> None:
    assert [shown(v) for v in ("a b", 7, 0.5, [1, 2], {"a": None})] == [
        "'a b'",
        "7",
        "0.5",
        "[1, 2]",
        "{'a': None}",
    ]
    assert plain("unet/conv_in.weight") == "unet/conv_in.weight"
    assert plain("a\nb") == "a\\nb"
    assert len(plain("x" * 200)) == 80


def test_letters_stay_and_what_steers_a_terminal_does_not() -> None:
    assert printable("caf\u00e9 \u732b\n\x1b[2J\udcff") == "caf\u00e9 \u732b\\n\\x1b[2J\\udcff"


def test_of_a_librarys_words_the_end_stays() -> None:
    assert (
        said(ValueError("at a.cpp:1\n  at b.cpp:2\n\nno such node\n")) == "at a.cpp:1 at b.cpp:2 no such node"
    )
    text = said(ValueError("begin " + "x" * 5000 + " end"))
    assert text.startswith("begin x")
    assert text.endswith("x end")
    assert len(text) == 600
    assert said(KeyError()) == "KeyError"
