"""Stage C sees captions, image embeddings, both or neither, in the shares that its options say."""

import copy
from typing import Any

import pytest
import torch

from tests.training.tasks.test_stage_b import CPU, Waves
from training.randomness import step_generator
from training.shapes import Shapes
from training.tasks.stage_c import StageCTask

SAMPLES = 4000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop_text", "keep_image", "image_alone"), [(0.1, 0.15, 0.8), (0.3, 0.5, 0.0), (0.0, 1.0, 1.0), (0.2, 0.0, 1.0)]
)
def test_shares_of_captions_and_images(
    components: dict[str, Any], drop_text: float, keep_image: float, image_alone: float
) -> None:
    names = ("prior", "effnet", "previewer", "text_encoder", "image_encoder")
    parts = copy.deepcopy({name: components[name] for name in names})
    pictures = [Waves(count, components["tokenizer"]) for count in (8, 2)]
    shares = {"drop_text": drop_text, "keep_image": keep_image, "image_alone": image_alone}
    task = StageCTask(
        **parts,
        **shares,
        dataset=pictures[0],
        unseen=pictures[1],
        shapes=Shapes((256, 256), (), every=4),
        weight={"kind": "p2"},
    )
    batch = task.batch(0, SAMPLES, step_generator(0, 0, 0, CPU))
    image = batch["image"].abs().sum((1, 2)) > 0
    text = (batch["pooled"] != task.data.text.pooled[-1].float()).any(-1).squeeze(1)
    assert torch.equal(text, (batch["text"] != task.data.text.tokens[-1].float()).any(-1).any(-1))
    alone = drop_text + (1 - drop_text) * image_alone
    expected = {
        (True, True): keep_image * (1 - alone),
        (False, True): keep_image * alone,
        (True, False): (1 - keep_image) * (1 - drop_text),
        (False, False): (1 - keep_image) * drop_text,
    }
    for (said, seen), share in expected.items():
        found = ((text == said) & (image == seen)).float().mean().item()
        assert found == pytest.approx(share, abs=5 * (share * (1 - share) / SAMPLES) ** 0.5), (said, seen)
