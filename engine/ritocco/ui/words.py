"""The page's own HTML: progress, previews, results, errors. Whatever comes from elsewhere is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from ritocco.pixels import Pixels


def heading(*, logout: bool) -> str:
    """The page's first line. logout: whether there is a session to leave."""
    leave = '<form method="post" action="logout"><button>Log out</button></form>' if logout else ""
    words = "Stable Diffusion inpainting on this server: white is repainted, black is kept."
    return f'<header class="heading"><h1>ritocco</h1><p>{words}</p>{leave}</header>'


def status(text: str, *, done: int = 0, total: int = 0) -> str:
    """A line that screen readers say, and a bar where there are steps."""
    bar = f'<progress max="{total}" value="{done}" aria-label="Steps taken"></progress>' if total else ""
    return f'<div class="status"><p role="status">{escape(text)}</p>{bar}</div>'


def alert(title: str, detail: str) -> str:
    """An error."""
    lines = "<br>".join(escape(line) for line in detail.strip().splitlines())
    return f'<div class="error" role="alert"><strong>{escape(title)}</strong><p>{lines}</p></div>'


def previews(pictures: Pixels) -> str:
    """Of latents, uint8 [N,h,w,3]."""
    shown = [
        _figure(_uri(one), f"Preview {place}", f"Preview of picture {place} of {len(pictures)}")
        for place, one in enumerate(pictures, 1)
    ]
    return _row(shown, "preview")


def results(urls: Sequence[str], *, prompt: str, seeds: Sequence[int]) -> str:
    """Pictures side by side. seeds: one for each, or none where it is not known whose is whose."""
    shown = []
    for place, url in enumerate(urls, 1):
        caption = f"Picture {place}" + (f", seed {seeds[place - 1]}" if seeds else "")
        words = f"Result {place} of {len(urls)}: {prompt}"
        shown.append(_figure(url, caption, words, link=True))
    return _row(shown, "result")


def figures(metrics: Mapping[str, Any], *, seed: int | None, id: str) -> str:
    """Times in seconds, the seed, the prediction's id."""
    rows = [] if seed is None else [("Seed", str(seed))]
    rows += [(name.replace("_", " ").capitalize(), f"{value:.2f} s") for name, value in metrics.items()]
    rows.append(("Prediction", id))
    body = "".join(f"<tr><th scope=row>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<table class="figures"><caption>What it took</caption><tbody>{body}</tbody></table>'


def sizes(name: str, picture: tuple[int, int], painted: tuple[int, int]) -> str:
    """What becomes of a picture's size."""
    (width, height), (wide, high) = picture, painted
    text = f"{name} has {width} x {height} pixels"
    if picture == painted:
        return _note(f"{text}, and is painted at that size.")
    text = f"{text}; it is resized to {wide} x {high}"
    stretch = wide * height / (high * width)
    if abs(stretch - 1) < 0.005:
        return _note(f"{text}.")
    across = f"{abs(stretch - 1):.0%} {'wider' if stretch > 1 else 'narrower'}"
    return _note(f"{text}, which makes it {across} for its height: nothing is cropped.")


def mask_link(png: bytes, name: str) -> str:
    """The mask that was run, to save."""
    held = base64.b64encode(png).decode("ascii")
    shown = escape(name, quote=True)
    return f'<p><a download="{shown}" href="data:image/png;base64,{held}">Save the mask as {shown}</a></p>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figure(url: str, caption: str, words: str, *, link: bool = False) -> str:
    image = f'<img src="{escape(url, quote=True)}" alt="{escape(words, quote=True)}">'
    if link:
        image = f'<a href="{escape(url, quote=True)}" target="_blank" rel="noopener">{image}</a>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _row(shown: Sequence[str], kind: str) -> str:
    return f'<div class="pictures {kind}">{"".join(shown)}</div>'


def _uri(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
