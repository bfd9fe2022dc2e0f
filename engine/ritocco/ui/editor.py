"""What Gradio's image editor gives to whoever is called with its value: where the layers lie, and no more.

Its method is replaced on the instance: Gradio writes a stub file beside the source of a subclass. It runs
on the event loop, so nothing is opened here.
"""

from __future__ import annotations

from typing import Any

import gradio as gr


def layers_of(payload: Any) -> list[str] | None:
    """The paths of the layers of an editor's value; None where it has no value."""
    return None if payload is None else [layer.path for layer in payload.layers]


def named(editor: gr.ImageEditor) -> None:
    """Have it give the paths of its layers."""
    vars(editor).update(preprocess=layers_of)
