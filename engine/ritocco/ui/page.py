"""The page: Gradio's controls, and which action each calls."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from ritocco.ui import masks, snippets, words
from ritocco.ui.actions import SIDES, Actions, Shown, message_of
from ritocco.ui.editor import named
from ritocco.ui.fields import Field

TITLE = "ritocco"
BASE = "ritocco.base"
"""Key of a request's scope: URL of the API, without a slash at the end."""
_FILES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
_FIRST = "Load a picture, paint over what is to change, and run."
# Gradio's editor puts a layer of the server's in the middle of whatever is on its canvas, and what the brush
# draws on stays as large as the largest picture so far, or 800 x 800: beside a smaller picture, out of sight.
_FIT_BRUSH = """(...values) => {
    window.editor?.tools?.get("brush")?.brush_textures?.initialize_textures();
    return values;
}"""


def build(actions: Actions, *, waiting: int, logout: bool) -> gr.Blocks:
    """The page, with its queue set up.

    waiting: predictions that the server takes. logout: whether there is one.
    """

    async def run(request: gr.Request, picture: str | None, layers: Any, *values: Any) -> AsyncIterator[Any]:
        try:
            base, page = request.request.scope[BASE], request.session_hash
            async for shown in actions.run(picture, layers, values, base=base, page=page or ""):
                yield _updates(shown)
        except Exception as error:
            yield _updates(Shown(message=message_of(error)))

    def cancel(request: gr.Request) -> None:
        actions.cancel(request.session_hash or "")

    def opened(picture: str | None) -> tuple[Any, ...]:
        return (*actions.open(picture), words.status(_FIRST))

    def noted(picture: str | None, width: Any, height: Any) -> tuple[Any, ...]:
        return actions.note(picture, width, height), gr.skip()

    def edited(action: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        return lambda *values: (action(*values), words.status("The mask has changed."))

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(words.heading(logout=logout), js_on_load=None)
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                picture = gr.File(label="Picture", file_types=_FILES, height=110, elem_id="picture")
                editor = _editor()
                named(editor)
                note = gr.HTML(js_on_load=None, elem_id="note")
                with gr.Row():
                    invert, clear, grow = (
                        gr.Button(f"{word} mask", size="sm", min_width=90, elem_id=word.lower())
                        for word in ("Invert", "Clear", "Grow")
                    )
                    load = gr.UploadButton(
                        "Load mask", file_types=_FILES, size="sm", min_width=90, elem_id="load"
                    )
                grow_px = gr.Slider(
                    1, masks.MAX_GROW_PX, 8, step=1, label="Grow by (pixels)", elem_id="grow-px"
                )
                _as_it_is(grow_px)
            with gr.Column(scale=2, min_width=400):
                controls = _controls(actions.inputs)
                with gr.Accordion("More than the original has", open=False):
                    more = _controls(actions.options)
                with gr.Row():
                    start = gr.Button("Run", variant="primary", elem_id="run")
                    stop = gr.Button("Cancel", elem_id="cancel")
        message = gr.HTML(words.status(_FIRST), js_on_load=None, elem_id="message")
        pictures = gr.HTML(js_on_load=None, elem_id="pictures")
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                python = _code("The same in Python", "python")
                curl = _code("The same with curl", "shell")
                saved = gr.HTML(js_on_load=None, elem_id="mask")
            with gr.Column(scale=2, min_width=400):
                figures = gr.HTML(js_on_load=None, elem_id="figures")
                log = gr.Textbox(label="Log", lines=6, max_lines=12, interactive=False, elem_id="log")

        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_limit": None,
        }
        sides = [controls[name] for name in SIDES]
        picture.change(_guarded(opened, 5), picture, [editor, *sides, note, message], **quick)
        for side in sides:
            side.input(_guarded(noted, 2), [picture, *sides], [note, message], **quick)
        for event, action, further in (
            (load.upload, actions.load_mask, [load]),
            (invert.click, actions.invert, []),
            (grow.click, actions.grow, [grow_px]),
        ):
            inputs = [picture, editor, *further]
            event(_guarded(edited(action), 2), inputs, [editor, message], js=_FIT_BRUSH, **quick)
        clear.click(_guarded(edited(actions.clear), 2), picture, [editor, message], **quick)
        shown = [message, pictures, figures, log, saved, python, curl]
        start.click(run, [picture, editor, *controls.values(), *more.values()], shown, **quick)
        stop.click(cancel, None, None, **quick)
    blocks.max_threads = max(blocks.max_threads, 2 * waiting)
    blocks.queue(api_open=False, default_concurrency_limit=None)
    return blocks


def _editor() -> gr.ImageEditor:
    return gr.ImageEditor(
        label="Mask: white is repainted",
        sources=(),
        transforms=(),
        buttons=["fullscreen"],
        brush=gr.Brush(colors=["rgba(255, 255, 255, 0.7)"], color_mode="fixed"),
        layers=gr.LayerOptions(allow_additional_layers=False),
        format="png",
        height=520,
        elem_id="editor",
    )


def _controls(fields: Sequence[Field]) -> dict[str, gr.components.Component]:
    """Texts one below the other, the rest in pairs."""
    made = {field.name: _control(field) for field in fields if field.kind == "text"}
    rest = [field for field in fields if field.kind != "text"]
    for first in range(0, len(rest), 2):
        with gr.Row():
            made |= {field.name: _control(field) for field in rest[first : first + 2]}
    return {field.name: made[field.name] for field in fields}


def _control(field: Field) -> gr.components.Component:
    """What a person enters a field with. What stands in it is the schema's to judge, in its words."""
    named: dict[str, Any] = {"label": field.label, "info": field.help, "min_width": 160}
    named["elem_id"] = field.name.replace("_", "-")
    if field.kind == "choice":
        made = gr.Dropdown(list(field.choices), value=field.default, **named)
    elif field.kind == "switch":
        made = gr.Checkbox(field.default, **named)
    elif field.step is not None:
        bounds: dict[str, Any] = {"minimum": field.least, "maximum": field.most, "step": field.step}
        made = gr.Slider(value=field.default, **bounds, **named)
    elif field.kind == "number":
        made = gr.Number(field.default, **named)
    else:
        lines = 1 if field.kind == "whole" else 2
        made = gr.Textbox("" if field.default is None else str(field.default), lines=lines, **named)
    return _as_it_is(made)


def _as_it_is(made: gr.components.Component) -> gr.components.Component:
    """A control without Gradio's judgement, which has no words."""
    vars(made).update(preprocess=lambda value: value)
    return made


def _code(label: str, language: Any) -> gr.Code:
    options = {"interactive": False, "wrap_lines": True, "elem_id": language}
    return gr.Code(snippets.LATER, label=label, language=language, **options)


def _updates(shown: Shown) -> list[Any]:
    return [gr.skip() if one is None else one for one in shown.values()]


def _guarded(call: Callable[..., Sequence[Any]], outputs: int) -> Callable[..., Sequence[Any]]:
    """What goes wrong becomes the message, which is the last output; the others stay as they are."""

    def guard(*values: Any) -> Sequence[Any]:
        try:
            return call(*values)
        except Exception as error:
            return (*[gr.skip()] * (outputs - 1), message_of(error))

    return guard
