"""How the page looks: the system's own fonts, so that nothing is fetched from anywhere."""

from __future__ import annotations

import gradio as gr

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

CSS = """
.heading { display: flex; align-items: baseline; gap: 1rem; }
.heading h1 { margin: 0; font-size: 1.5rem; font-weight: 650; }
.heading p { margin: 0; flex: 1; }
.heading button { text-decoration: underline; cursor: pointer; }
.note { margin: 0; color: var(--body-text-color); }
.status p { margin: 0 0 .35rem; }
.status progress { width: 100%; height: .75rem; accent-color: var(--color-accent); }
.error { padding: .75rem 1rem; border: 2px solid #b91c1c; border-radius: .5rem; background: #fef2f2; }
.error, .error strong, .error p { color: #7f1d1d; }
.error p { margin: .25rem 0 0; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; max-width: 32rem; }
.pictures img { display: block; width: 100%; height: auto; border-radius: .5rem; }
.pictures figcaption { padding-top: .35rem; color: var(--body-text-color); }
.cm-line span { color: inherit !important; } /* the colours of code are too pale to read */
#figures .figures { border-collapse: collapse; width: 100%; }
#figures caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
#figures th, #figures td { border: 0; padding: .1rem 1rem .1rem 0; text-align: left; font-weight: 400; }
#figures td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
"""

HEAD = ""


def theme() -> gr.themes.Base:
    """Gradio's own, with colours that stand out enough from what is behind them."""
    made = gr.themes.Default(primary_hue="blue", font=list(_SANS), font_mono=list(_MONO))
    subdued, subdued_dark = "*neutral_600", "*neutral_300"
    return made.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
        body_text_color_subdued=subdued,
        body_text_color_subdued_dark=subdued_dark,
        block_info_text_color=subdued,
        block_info_text_color_dark=subdued_dark,
        block_label_text_color=subdued,
        block_label_text_color_dark=subdued_dark,
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )
