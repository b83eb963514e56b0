"""Text and image encoders against diffusers' own prior pipeline, and its behaviour at the edges."""

import logging
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_cascade import StableCascadePriorPipeline
from PIL import Image

from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.stages.text import TextEncoder

PROMPTS = ["A Red Apple on a green background", "", "don't", "x" * 90, "  two\n  lines, 3 words "]


@pytest.fixture(scope="module")
def encoder(components: dict[str, Any]) -> TextEncoder:
    return TextEncoder(components["tokenizer"], components["text_encoder"])


@pytest.fixture(scope="module")
def image_encoder(components: dict[str, Any]) -> ImagePromptEncoder:
    return ImagePromptEncoder(components["feature_extractor"], components["image_encoder"])


@pytest.fixture(scope="module")
def pipeline(components: dict[str, Any]) -> StableCascadePriorPipeline:
    names = ("tokenizer", "text_encoder", "feature_extractor", "image_encoder")
    parts = {name: components[name] for name in names}
    return StableCascadePriorPipeline(**parts, prior=None, scheduler=None)


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


@torch.no_grad()
def test_text_equals_diffusers(encoder: TextEncoder, pipeline: StableCascadePriorPipeline) -> None:
    tokens, pooled, *_ = pipeline.encode_prompt("cpu", len(PROMPTS), 1, False, prompt=PROMPTS)
    ours = encoder.encode(PROMPTS)
    assert ours.tokens.shape == (5, 77, 32)
    assert ours.pooled.shape == (5, 1, 24)
    torch.testing.assert_close(ours.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_negative_text_equals_diffusers(encoder: TextEncoder, pipeline: StableCascadePriorPipeline) -> None:
    *_, tokens, pooled = pipeline.encode_prompt("cpu", 1, 1, True, prompt="an apple", negative_prompt="worms")
    ours = encoder.encode(["worms"])
    torch.testing.assert_close(ours.tokens, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_equal_diffusers(image_encoder: ImagePromptEncoder, pipeline: StableCascadePriorPipeline) -> None:
    images = [gradient(50, 40), gradient(20, 70), gradient(32, 32, "L"), gradient(40, 50, "RGBA")]
    theirs, _ = pipeline.encode_image(images, "cpu", torch.float32, 1, 1)
    ours = image_encoder.encode(images)
    assert ours.shape == (4, 1, 12)
    torch.testing.assert_close(ours.transpose(0, 1), theirs, atol=1e-5, rtol=0)


def test_attention_mask_reaches_the_padding(encoder: TextEncoder) -> None:
    """Without the mask only the padding's hidden states would differ, which no look at the words would show."""
    batch = encoder.tokenizer(["an apple"], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        unmasked = encoder.encoder(batch.input_ids, output_hidden_states=True).hidden_states[-1]
    words = int(batch.attention_mask.sum())
    ours = encoder.encode(["an apple"]).tokens
    torch.testing.assert_close(ours[:, :words], unmasked[:, :words])
    assert (ours[:, words:] - unmasked[:, words:]).abs().max() > 1e-3


def test_case_is_ignored(encoder: TextEncoder) -> None:
    upper, lower = encoder.encode(["AN APPLE", "an apple"]).tokens
    torch.testing.assert_close(upper, lower)


def test_a_prompt_does_not_depend_on_its_batch(encoder: TextEncoder) -> None:
    alone = encoder.encode(["an apple"])
    among = encoder.encode(["a much longer prompt than that", "an apple"])
    torch.testing.assert_close(among.tokens[1], alone.tokens[0])


def test_cut_prompt_is_quoted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    kept = "a" * 70 + " Apple"  # 75 tokens, which fills the 77
    with caplog.at_level(logging.WARNING, "cascade"):
        cut = encoder.encode(["short", kept + " A Worm's Tail"])
    assert [record.getMessage() for record in caplog.records] == [
        'The prompt exceeds 77 tokens; this end of it was left out: "A Worm\'s Tail"'
    ]
    torch.testing.assert_close(cut.tokens[1], encoder.encode([kept]).tokens[0])


def test_cut_prompt_is_not_quoted_where_prompts_are_private(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder(components["tokenizer"], components["text_encoder"], log_prompts=False)
    encoder.encode(["a" * 75 + "secret"])
    assert [record.getMessage() for record in caplog.records] == ["The prompt exceeds 77 tokens; 6 were left out."]


def test_of_a_long_cut_200_characters_are_quoted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "cut " * 2000
    encoder.encode(["a" * 75 + " " + long])
    (record,) = caplog.records
    assert record.getMessage().endswith(repr(long[:200] + "..."))


def test_prompt_that_fits_exactly_is_not_warned_of(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode(["a" * 75])
    assert caplog.text == ""
    encoder.encode(["a" * 76])
    assert "left out: 'a'" in caplog.text


def test_no_gradients_are_kept(encoder: TextEncoder, image_encoder: ImagePromptEncoder) -> None:
    embeddings = encoder.encode(["an apple"])
    assert not embeddings.tokens.requires_grad
    assert not image_encoder.encode([gradient(32, 32)]).requires_grad


def test_a_bare_text_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(TypeError, match="'an apple'"):
        encoder.encode("an apple")
