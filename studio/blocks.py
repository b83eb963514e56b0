"""Gradio's page, without the work that Gradio does for what an event leaves as it is. Written for Gradio 6.31.0."""

import copy
from typing import Any

import gradio as gr
from gradio.blocks import Block, BlockFunction
from gradio.state_holder import SessionState


class Blocks(gr.Blocks):
    """Gradio's page. Its events return dictionaries: component -> value or `gr.update`.

    Gradio makes each component anew that such a dictionary leaves out: 40 ms of a processor for the fifty outputs of Make,
    at every preview.
    """

    async def postprocess_data(
        self, block_fn: BlockFunction, predictions: Any, state: SessionState | None
    ) -> list[Any]:
        """What the browser is sent for each output.

        Args:
            block_fn: the event's function.
            predictions: what it returned.
            state: of the browser's session.
        """
        if (
            not predictions
            or not isinstance(predictions, dict)
            or not all(isinstance(one, Block) for one in predictions)
        ):
            return await super().postprocess_data(block_fn, predictions, state)
        changing = copy.copy(block_fn)
        changing.outputs = [one for one in block_fn.outputs if one in predictions]
        values = [predictions[one] for one in changing.outputs]
        made = await super().postprocess_data(changing, values if len(values) != 1 else values[0], state)
        sent = dict(zip(changing.outputs, made, strict=True))
        return [sent.get(one, None if one.stateful else gr.skip()) for one in block_fn.outputs]
