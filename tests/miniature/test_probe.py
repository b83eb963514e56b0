"""The linear probe on the vision tower."""

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from miniature import probe
from tests.miniature.small import pack


@pytest.mark.slow
def test_a_linear_rule_is_learned_and_noise_is_not() -> None:
    torch.manual_seed(0)
    inputs, rule = torch.randn(4000, 8), torch.randn(8, 5)
    labels = (inputs @ rule).argmax(1)
    learned = probe.train_probe(inputs[:3000], labels[:3000], 5, 300)
    assert (learned(inputs[3000:]).argmax(1) == labels[3000:]).float().mean() > 0.9
    shuffled = probe.train_probe(inputs[:3000], labels[:3000].roll(1), 5, 300)
    assert (shuffled(inputs[3000:]).argmax(1) == labels[3000:]).float().mean() < 0.5


@pytest.mark.slow
def test_a_tower_is_judged_on_unseen_scenes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "image_encoder")
    drawings = pack([f"thing {i}" for i in range(6)], tmp_path / "drawings.zip")
    options = ["--weights", tmp_path, "--drawings", drawings, "--scenes", "60", "--unseen", "20", "--steps", "5"]
    with caplog.at_level(logging.INFO):
        probe.main(list(map(str, options)))
    assert "18 drawings, 20 unseen scenes" in caplog.text
    first, five = map(float, re.findall(r"\| drawing \S+ \S* ?\| ([\d.]+) %", caplog.text.replace("in 5", "in5")))
    assert 0 <= first <= five <= 100
