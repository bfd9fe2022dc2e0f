"""What was run, as a person would write it: Python, and curl against this server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

LATER = "# After a run it stands here."
"""A comment in either language."""
_IMAGE, _MASK = "\x00image", "\x00mask"


def python_of(image: str, mask: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A program that paints the same pictures.

    image, mask: names of files. given: the inputs but for these two. options: keyword arguments.
    """
    lines = [
        f"        {name!r}: {value!r}," for name, value in {"image": image, "mask": mask, **given}.items()
    ]
    lines += ["    },", *(f"    {name}={value!r}," for name, value in options.items())]
    body = "\n".join(lines)
    return (
        f"import ritocco\n\nprediction = ritocco.predict(\n    {{\n{body}\n)\n"
        'for index, picture in enumerate(prediction.images):\n    picture.save(f"out-{index}.png")\n'
    )


def curl_of(image: str, mask: str, input: Mapping[str, Any], *, base: str, token: bool) -> str:
    """Commands for a POSIX shell that ask this server for the same.

    image, mask: names of files. input: as over HTTP, but for these two. base: URL of the API. token: whether
    one is needed; the command takes it from RITOCCO_TOKEN.
    """
    body = json.dumps({"input": {"image": _IMAGE, "mask": _MASK, **input}})
    before, _, rest = body.partition(json.dumps(_IMAGE)[1:-1])
    between, _, after = rest.partition(json.dumps(_MASK)[1:-1])
    uri = "data:application/octet-stream;base64,"  # the server looks at the bytes
    parts = [
        f"printf %s {shlex.quote(before + uri)}",
        f"base64 < {shlex.quote(_plain_path(image))} | tr -d '\\n'",
        f"printf %s {shlex.quote(between + uri)}",
        f"base64 < {shlex.quote(_plain_path(mask))} | tr -d '\\n'",
        f"printf %s {shlex.quote(after)}",
    ]
    headers = ['-H "Authorization: Bearer $RITOCCO_TOKEN"'] if token else []
    headers += ["-H 'Content-Type: application/json'", "-H 'Prefer: wait'"]
    joined = "\n  ".join(parts)
    asked = " \\\n  ".join([f"curl -s {shlex.quote(f'{base}/predictions')}", *headers, "--data-binary @-"])
    return f"{{\n  {joined}\n}} | {asked}\n"


def _plain_path(name: str) -> str:
    """No name is taken for an option, or anything but a file."""
    return name if name.startswith("/") else f"./{name}"
