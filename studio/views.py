"""What the page shows of pictures and requests: HTML, and updates of its components."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from studio.session import Made, State

EMPTY = '<div class="frame empty"><p>The picture appears here.</p></div>'
BEGUN = (
    '<div class="frame empty"><p>Making ...</p></div><div class="bar"><progress aria-label="Progress"></progress></div>'
)

# How far to the right the slider shows the image that a picture was made from, in percent.
SIDES = {"Before": 100, "Both": 50, "After": 0}


def running(prompt: str, state: State) -> str:
    """A request that runs: its previews, and how far it is."""
    if not state.total:
        return BEGUN
    said = f"{state.done} of {state.total}"
    pictures = "".join(f'<img src="{url}" alt="Preview: {html.escape(prompt)}">' for url in state.previews)
    inner = f'<div class="previews n{len(state.previews)}">{pictures}</div>' if pictures else "<p>Making ...</p>"
    bar = f'<progress max="{state.total}" value="{state.done}" aria-label="Progress"></progress><span>{said}</span>'
    return f'<div class="frame{"" if pictures else " empty"}">{inner}</div><div class="bar">{bar}</div>'


def finished(made: Made) -> str:
    """A picture in its frame."""
    with Image.open(made.path) as picture:
        width, height = picture.size
    prompt = html.escape(made.given["prompt"] or "no prompt")
    source = f"gradio_api/file={html.escape(str(made.path))}"
    return f'<div class="frame"><img src="{source}" alt="{prompt}" width="{width}" height="{height}"></div>'


def settings(made: Made, defaults: Mapping[str, Any]) -> str:
    """The inputs of a picture that are not the defaults, and its seed."""
    changed = {name: value for name, value in made.given.items() if value != defaults[name] or name == "prompt"}
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(_text(value))}</dd>" for name, value in changed.items())
    own = "" if made.index == 0 else f"<dt>seed of this picture</dt><dd>{made.seed}</dd>"
    return f"<dl>{rows}{own}</dl>"


def beside(text: str, kind: str = "note") -> dict[str, Any]:
    """A sentence beside an input, as an update of the `gr.HTML` there; the kind "error" is read aloud at once."""
    role = "alert" if kind == "error" else "status"
    return gr.update(value=f'<p class="{kind}" role="{role}">{html.escape(text)}</p>', visible=True)


def compared(side: str) -> dict[str, Any]:
    """An update of the slider: it stands where one of `SIDES` says."""
    return gr.update(slider_position=SIDES[side])


def laid(image: str | None) -> dict[str, Any]:
    """An update of the brush: nothing painted, over an image."""
    return gr.update(value={"background": image, "layers": [], "composite": None} if image else None)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value.name if isinstance(value, Path) else str(value)
