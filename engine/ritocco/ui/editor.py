"""Gradio's image editor, with bounds: what it is sent, and what it keeps between a stroke and its use.

Its methods are replaced on the instance: Gradio writes a stub file beside the source of a subclass.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr

from ritocco.errors import RequestError

LAYERS = 4
_KEPT = 64
_LONGEST_ID = 64


class Strokes:
    """The layers that browsers sent, by an id of theirs: the last few, each taken once."""

    def __init__(self, *, most_bytes: int, room: Any) -> None:
        """most_bytes: of a layer. room: has `inside`, for layers that lie in files of ours."""
        self._most, self._room = most_bytes, room
        self._held: OrderedDict[str, dict[int, bytes]] = OrderedDict()

    def accept(self, data: Any) -> None:
        """Keep a layer. data: `data` says `type`, `index` and `id`; `files` are names and bytes.

        Background and composite are of no use here. Raises RequestError for what no editor sends.
        """
        told, files = data.data, data.files
        id, index = str(told.get("id", "")), str(told.get("index", ""))
        if told.get("type") != "layer":
            return
        if not 0 < len(id) <= _LONGEST_ID or index not in map(str, range(LAYERS)) or len(files) != 1:
            raise RequestError("the editor's layer is none", field="input.mask")
        if len(files[0][1]) > self._most:
            rule = f"at most {self._most} are read"
            raise RequestError(f"the editor's layer has {len(files[0][1])} bytes; {rule}", field="input.mask")
        self._held.setdefault(id, {})[int(index)] = files[0][1]
        self._held.move_to_end(id)
        while len(self._held) > _KEPT:
            self._held.popitem(last=False)

    def take(self, payload: Any) -> list[bytes] | None:
        """The encoded layers of the editor's value; None where it has no picture."""
        if payload is None:
            return None
        if payload.id is not None:
            held = self._held.pop(payload.id, {})
            return [held[index] for index in sorted(held)]
        files: list[Path] = [self._room.inside(layer.path) for layer in payload.layers[:LAYERS]]
        return [file.read_bytes() for file in files]


def bounded(editor: gr.ImageEditor, *, most_bytes: int, room: Any) -> None:
    """Have an editor keep its strokes so, and give its layers to whoever is called with it."""
    strokes = Strokes(most_bytes=most_bytes, room=room)

    def accept_blobs(data: Any) -> None:
        strokes.accept(data)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    vars(editor).update(accept_blobs=accept_blobs, preprocess=strokes.take)
