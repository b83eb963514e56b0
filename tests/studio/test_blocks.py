"""What the page's events send to the browser is what Gradio would send, for less work."""

import asyncio
import copy
from collections.abc import Mapping
from typing import Any

import pytest


def laid_out(kind: type) -> tuple[Any, dict[str, Any]]:
    """A page with an event that may change each of its components; these by name."""
    import gradio as gr

    with kind() as page:
        parts = {
            "text": gr.Textbox("old"),
            "note": gr.HTML("old", visible=False),
            "fold": gr.Accordion("fold", open=False),
            "state": gr.State(-1),
        }
        gr.Button().click(lambda: {}, None, [*parts.values()])
    return page, parts


def sent(kind: type, *returned: Mapping[str, Any]) -> list[list[Any]]:
    """What the browser is sent when the event returns one dictionary after the other."""
    from gradio.state_holder import SessionState

    page, parts = laid_out(kind)
    (event,) = page.fns.values()
    state = SessionState(page)

    async def all_of_them() -> list[list[Any]]:
        return [
            await page.postprocess_data(event, {parts[name]: value for name, value in one.items()}, state)
            for one in copy.deepcopy(returned)  # Gradio takes the values out of updates
        ]

    return asyncio.run(all_of_them())


@pytest.mark.slow
def test_what_is_sent_is_what_gradio_sends() -> None:
    import gradio as gr

    from studio.blocks import Blocks

    returned = (
        {"text": "new", "state": 3},
        {"note": gr.update(value="<p>new</p>", visible=True)},
        {"fold": gr.update(open=True), "note": gr.update(visible=False), "text": gr.update(value="newer")},
        {"state": 4},
        {"text": None},
    )
    made = sent(Blocks, *returned)
    assert made[0][0] == "new"
    assert made[1][1]["visible"] is True
    # Of HTML that stays, Gradio says that it has the property "__type__".
    oddity = {"props": {"__type__": "update"}, "__type__": "update"}
    theirs = [[gr.skip() if one == oddity else one for one in row] for row in sent(gr.Blocks, *returned)]
    assert made == theirs


@pytest.mark.slow
def test_no_component_is_made_for_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio as gr

    from studio.blocks import Blocks

    made: list[str] = []
    configured = gr.blocks.Block.__init__

    def noted(block: Any, *args: Any, **options: Any) -> None:
        made.append(type(block).__name__)
        configured(block, *args, **options)

    page, parts = laid_out(Blocks)
    (event,) = page.fns.values()
    monkeypatch.setattr(gr.blocks.Block, "__init__", noted)
    asyncio.run(page.postprocess_data(event, {parts["note"]: gr.update(visible=True)}, None))
    assert set(made) == {"HTML"}
