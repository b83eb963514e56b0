"""The conditioner against diffusers' own prior pipeline, and its behaviour at the edges."""

import logging
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_cascade import StableCascadePriorPipeline
from PIL import Image

from cascade.conditioning import Conditioner

PROMPTS = ["A Red Apple on a green background", "", "don't", "x" * 90, "  two\n  lines, 3 words "]


@pytest.fixture(scope="module")
def conditioner(components: dict[str, Any]) -> Conditioner:
    names = ("tokenizer", "text_encoder", "feature_extractor", "image_encoder")
    return Conditioner(*(components[name] for name in names))


@pytest.fixture(scope="module")
def pipeline(components: dict[str, Any]) -> StableCascadePriorPipeline:
    names = ("tokenizer", "text_encoder", "feature_extractor", "image_encoder")
    parts = {name: components[name] for name in names}
    return StableCascadePriorPipeline(**parts, prior=None, scheduler=None)


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


@torch.no_grad()
def test_text_equals_diffusers(conditioner: Conditioner, pipeline: StableCascadePriorPipeline) -> None:
    tokens, pooled, *_ = pipeline.encode_prompt("cpu", len(PROMPTS), 1, False, prompt=PROMPTS)
    ours = conditioner.encode_text(PROMPTS)
    assert ours.tokens.shape == (5, 77, 32)
    assert ours.pooled.shape == (5, 1, 24)
    torch.testing.assert_close(ours.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_negative_text_equals_diffusers(conditioner: Conditioner, pipeline: StableCascadePriorPipeline) -> None:
    *_, tokens, pooled = pipeline.encode_prompt("cpu", 1, 1, True, prompt="an apple", negative_prompt="worms")
    ours = conditioner.encode_text(["worms"])
    torch.testing.assert_close(ours.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_equal_diffusers(conditioner: Conditioner, pipeline: StableCascadePriorPipeline) -> None:
    images = [gradient(50, 40), gradient(20, 70), gradient(32, 32, "L"), gradient(40, 50, "RGBA")]
    theirs, _ = pipeline.encode_image(images, "cpu", torch.float32, 1, 1)
    ours = conditioner.encode_images(images)
    assert ours.shape == (4, 1, 12)
    torch.testing.assert_close(ours.transpose(0, 1), theirs, atol=1e-5, rtol=0)


def test_attention_mask_reaches_the_padding(conditioner: Conditioner) -> None:
    """Without the mask only the padding's hidden states would differ, which no look at the words would show."""
    batch = conditioner.tokenizer(["an apple"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        unmasked = conditioner.text_encoder(batch.input_ids, output_hidden_states=True).hidden_states[-1]
    words = int(batch.attention_mask.sum())
    ours = conditioner.encode_text(["an apple"]).tokens
    torch.testing.assert_close(ours[:, :words], unmasked[:, :words])
    assert (ours[:, words:] - unmasked[:, words:]).abs().max() > 1e-3


def test_case_is_ignored(conditioner: Conditioner) -> None:
    upper, lower = conditioner.encode_text(["AN APPLE", "an apple"]).tokens
    torch.testing.assert_close(upper, lower)


def test_a_prompt_does_not_depend_on_its_batch(conditioner: Conditioner) -> None:
    alone = conditioner.encode_text(["an apple"])
    among = conditioner.encode_text(["a much longer prompt than that", "an apple"])
    torch.testing.assert_close(among.tokens[1], alone.tokens[0])


def test_cut_prompt_is_quoted(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    kept = "a" * 70 + " Apple"  # 75 tokens, which fills the 77
    with caplog.at_level(logging.WARNING, "cascade"):
        cut = conditioner.encode_text(["short", kept + " A Worm's Tail"])
    assert [record.getMessage() for record in caplog.records] == [
        'The prompt exceeds 77 tokens; this end of it was left out: "A Worm\'s Tail"'
    ]
    torch.testing.assert_close(cut.tokens[1], conditioner.encode_text([kept]).tokens[0])


def test_cut_prompt_is_not_quoted_where_prompts_are_private(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    conditioner = Conditioner(components["tokenizer"], components["text_encoder"], log_prompts=False)
    conditioner.encode_text(["a" * 75 + "secret"])
    assert [record.getMessage() for record in caplog.records] == ["The prompt exceeds 77 tokens; 6 were left out."]


def test_of_a_long_cut_200_characters_are_quoted(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    long = "cut " * 2000
    conditioner.encode_text(["a" * 75 + " " + long])
    (record,) = caplog.records
    assert record.getMessage().endswith(repr(long[:200] + "..."))


def test_prompt_that_fits_exactly_is_not_warned_of(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    conditioner.encode_text(["a" * 75])
    assert caplog.text == ""
    conditioner.encode_text(["a" * 76])
    assert "left out: 'a'" in caplog.text


def test_no_gradients_are_kept(conditioner: Conditioner) -> None:
    embeddings = conditioner.encode_text(["an apple"])
    assert not embeddings.tokens.requires_grad
    assert not conditioner.encode_images([gradient(32, 32)]).requires_grad


def test_a_bare_text_is_refused(conditioner: Conditioner) -> None:
    with pytest.raises(TypeError, match="'an apple'"):
        conditioner.encode_text("an apple")


def test_images_need_a_vision_tower(components: dict[str, Any]) -> None:
    conditioner = Conditioner(components["tokenizer"], components["text_encoder"])
    with pytest.raises(ValueError, match=r"--with image-encoder, then scripts/save-weights, add it\."):
        conditioner.encode_images([gradient(32, 32)])
