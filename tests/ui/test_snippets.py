"""What can be copied is run: Python with `ast`, shell with a shell, and both ask for what was asked."""

from __future__ import annotations

import ast
import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ritocco
from ritocco.ui.snippets import curl_of, python_of

NASTY = 'a "cat" it\'s $HOME `id` \\ %s {x} \u00e9 \U0001f408 </script>\n"; rm -rf / #'
GIVEN: dict[str, Any] = {"prompt": NASTY, "seed": 2**64 - 1, "guidance_scale": 7.5, "width": 64}
NAMES = ["photo.jpg", 'my photo\'s $(id) "1".png', "-rf.png"]


@pytest.mark.parametrize("name", NAMES)
def test_python_asks_for_the_same(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, Any]] = []

    class Made:
        images = ()

    def predict(input: Any, **options: Any) -> Any:
        asked.append((input, options))
        return Made

    text = python_of(name, "mask.png", GIVEN, {"strength": 0.5})
    tree = ast.parse(text)
    assert [type(one).__name__ for one in tree.body] == ["Import", "Assign", "For"]
    monkeypatch.setattr(ritocco, "predict", predict)
    monkeypatch.chdir(tmp_path)
    exec(compile(tree, "snippet", "exec"), {})  # noqa: S102 - what it is for
    assert asked == [({"image": name, "mask": "mask.png", **GIVEN}, {"strength": 0.5})]


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_curl_sends_the_same(name: str, token: bool, tmp_path: Path) -> None:
    """With a curl that writes down what it is given."""
    shell, bash = shutil.which("sh"), tmp_path / "curl"
    assert shell is not None
    bash.write_text(f'#!{shell}\nprintf "%s\\n" "$@" > arguments\ncat > body\n', encoding="utf-8")
    bash.chmod(0o755)
    picture, mask = bytes(range(256)) * 2000, b"mask"
    (tmp_path / name).write_bytes(picture)
    (tmp_path / "mask.png").write_bytes(mask)
    base = "http://127.0.0.1:5000/a%20b/v1"
    text = curl_of(name, "mask.png", GIVEN | {"ritocco": {"strength": 0.5}}, base=base, token=token)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RITOCCO_TOKEN": "secret", "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-eu"], input=text, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    sent = json.loads((tmp_path / "body").read_bytes())["input"]
    decoded = [base64.b64decode(sent.pop(one).partition(",")[2]) for one in ("image", "mask")]
    assert decoded == [picture, mask]
    assert sent == GIVEN | {"ritocco": {"strength": 0.5}}
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").splitlines()
    assert f"{base}/predictions" in arguments
    assert ("Authorization: Bearer secret" in arguments) == token
