"""Every option of every command says what it is."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import typer

import ritocco_bench
from ritocco import cli


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Of every benchmark."""
    for module in pkgutil.iter_modules(ritocco_bench.__path__, "ritocco_bench."):
        made = importlib.import_module(module.name)
        if "ArgumentParser(" not in inspect.getsource(made):
            continue
        takes = inspect.signature(made._parser).parameters
        yield made._parser(*("bench" for _ in takes))


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
        else:
            yield parser.prog, action


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")


@pytest.mark.filterwarnings("ignore")  # what benchmarks import of others
def test_every_option_of_every_benchmark_has_help() -> None:
    found = [(prog, action) for parser in parsers() for prog, action in actions(parser)]
    assert {"python -m ritocco_bench.fleet", "python -m ritocco_bench.ladder", "bench steps"} <= {
        prog for prog, _ in found
    }
    assert [f"{prog} {action.dest}" for prog, action in found if not action.help] == []
    for parser in parsers():
        parser.format_help()  # raises where a % is amiss


def test_every_option_of_every_command_has_help() -> None:
    cli._add_plugins()
    found = dict(commands(typer.main.get_command(cli.app), "ritocco"))
    assert {"ritocco predict", "ritocco export", "ritocco serve"} <= found.keys()
    silent = [
        f"{path} {option.name}"
        for path, command in found.items()
        for option in command.params
        if option.name != "help" and not option.help
    ]
    assert silent == []
