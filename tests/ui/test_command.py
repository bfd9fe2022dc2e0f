"""`ritocco ui` is `ritocco serve` with the page, and says what it needs before it loads a model."""

from __future__ import annotations

import subprocess
import sys
from operator import attrgetter
from typing import Any

import pytest
import typer

from ritocco import BackendError, cli


def ran(*argv: str, without: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules[{without!r}] = None; " if without else "import sys; "
    code += f"sys.argv[1:] = {list(argv)!r}; from ritocco import cli; cli.main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_it_has_all_options_but_its_own() -> None:
    app: Any = typer.main.get_command(cli.app)
    told = attrgetter("opts", "secondary_opts", "default", "envvar", "multiple", "help")
    ours, theirs = ({one.name: told(one) for one in app.commands[name].params} for name in ("ui", "serve"))
    assert theirs.keys() - ours.keys() == {"ui"}
    assert all(ours[name] == theirs[name] for name in ours)
    assert "RITOCCO_DATABASE" in ours["database"]


def test_others_are_not_let_in_without_tokens() -> None:
    done = ran("ui", "--host", "0.0.0.0")  # noqa: S104 - refused
    assert done.returncode == 2
    assert "--host is '0.0.0.0', which others can reach" in done.stderr


@pytest.mark.parametrize("command", [("ui",), ("serve", "--ui")])
def test_the_error_without_gradio_names_the_extra(command: tuple[str, ...]) -> None:
    done = ran(*command, without="gradio")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'error: the server needs gradio; pip install "ritocco[ui]"\n'


def test_mounting_without_gradio_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import ritocco.ui

    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("ritocco.ui.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendError, match=r'the page needs gradio; pip install "ritocco\[ui\]"'):
        ritocco.ui.mount(None)  # type: ignore[arg-type]


def test_an_import_brings_no_gradio() -> None:
    code = (
        "import sys, ritocco.ui, ritocco.cli; print([n for n in ('gradio', 'starlette') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
