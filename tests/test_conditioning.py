"""The conditioner against diffusers' own prior pipeline, and its behaviour at the edges."""

import logging
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_cascade import StableCascadePriorPipeline
from PIL import Image

from cascade.conditioning import Conditioner
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.text import joined

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
    ours = joined(conditioner.encode_prompts(PROMPTS, most_chunks=1))
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


@torch.no_grad()
@pytest.mark.parametrize("weighting", [False, True])
def test_short_prompts_are_encoded_as_transformers_does(conditioner: Conditioner, weighting: bool) -> None:
    """To the bit: neither chunks nor weights of 1 change them."""
    prompts = ["a red apple", "", "a" * 75]
    batch = conditioner.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    expected = conditioner.text_encoder(**batch, output_hidden_states=True)
    ours = conditioner.encode_text(prompts, weighting=weighting)
    assert torch.equal(ours.tokens, expected.hidden_states[-1])
    assert torch.equal(ours.pooled[:, 0], expected.text_embeds)
    assert ours.bias is None


def test_long_prompts_are_encoded_in_chunks(conditioner: Conditioner) -> None:
    first, second = "a" * 75, " " + "b" * 10
    long, short = conditioner.encode_prompts([first + second, "c"])
    assert [long.tokens.shape, short.tokens.shape] == [(1, 154, 32), (1, 77, 32)]
    parts = conditioner.encode_text([first, second])
    torch.testing.assert_close(long.tokens[0], parts.tokens.flatten(0, 1))
    torch.testing.assert_close(long.pooled, parts.pooled[:1])
    # The engine itself has no limit.
    (longest,) = conditioner.encode_prompts(["a" * 751])
    assert longest.tokens.shape == (1, 77 * 11, 32)


def test_texts_of_unlike_lengths_in_one_batch(conditioner: Conditioner) -> None:
    prompts = ["a" * 200, "b", "c" * 100]
    together = conditioner.encode_text(prompts)
    assert together.tokens.shape == (3, 231, 32)
    for row, (one, length) in enumerate(zip(conditioner.encode_prompts(prompts), (231, 77, 154), strict=True)):
        assert torch.equal(together.tokens[row, :length], one.tokens[0])
        assert not together.tokens[row, length:].any()
        assert together.bias[row].tolist() == [0] * length + [-torch.inf] * (231 - length)


@pytest.fixture(scope="module")
def empty(conditioner: Conditioner) -> torch.Tensor:
    return conditioner.encode_text([""]).tokens[0]


@pytest.mark.parametrize("weight", [0, -1, 0.5, 1.1, 4])
def test_weights(conditioner: Conditioner, empty: torch.Tensor, weight: float) -> None:
    """e + w (z - e) for the words in brackets. All others, end of text, padding and the pooled text: to the bit as without."""
    weighted = conditioner.encode_text([f"a (bc:{weight}) d"], weighting=True)
    plain = conditioner.encode_text(["a bc d"])
    inside = slice(2, 4)
    expected = empty[inside] + weight * (plain.tokens[0, inside] - empty[inside])
    torch.testing.assert_close(weighted.tokens[0, inside], expected)
    for outside in (slice(0, 2), slice(4, 77)):
        assert torch.equal(weighted.tokens[0, outside], plain.tokens[0, outside])
    assert torch.equal(weighted.pooled, plain.pooled)


def test_weights_of_later_chunks(conditioner: Conditioner, empty: torch.Tensor) -> None:
    """The empty prompt's state at the same place of 77."""
    weighted = conditioner.encode_text(["a" * 75 + "(bc:0)"], weighting=True).tokens[0]
    assert torch.equal(weighted[:77], conditioner.encode_text(["a" * 75 + " bc"]).tokens[0, :77])
    assert torch.equal(weighted[78:80], empty[1:3])


def test_without_weighting_brackets_are_text(conditioner: Conditioner) -> None:
    def ids(prompt: str, weighting: bool) -> list[int]:
        return [token.id for chunk in conditioner.read(prompt, weighting=weighting) for token in chunk.tokens]

    prompt = r"a ((bc:1.3) \(d"
    assert ids(prompt, False) == conditioner.tokenizer(prompt).input_ids[1:-1]
    assert ids(prompt, True) != ids(prompt, False)


def test_embeddings_stand_for_words(components: dict[str, Any]) -> None:
    """A word's own vector makes the states that the word makes; a name may also come with the call."""
    tokenizer, text_encoder = components["tokenizer"], components["text_encoder"]
    ids = tokenizer(["xy"]).input_ids[0][1:-1]
    vectors = text_encoder.get_input_embeddings().weight[ids].detach()
    expected = Conditioner(tokenizer, text_encoder).encode_text(["a xy b"])
    loaded = Conditioner(tokenizer, text_encoder, embeddings=Embeddings(32, words={"style": vectors}))
    named = Conditioner(tokenizer, text_encoder)
    for weighting in (False, True):
        prompt = "a embedding:style b"
        (by_call,) = named.encode_prompts([prompt], weighting=weighting, words={"style": vectors})
        for made in (loaded.encode_text([prompt], weighting=weighting), by_call):
            assert torch.equal(made.tokens, expected.tokens)
            assert torch.equal(made.pooled, expected.pooled)
    assert not text_encoder.get_input_embeddings()._forward_hooks


def test_cut_prompt_is_quoted(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    kept = "a" * 145 + " Apple"  # 150 tokens, which fill two chunks
    with caplog.at_level(logging.WARNING, "cascade"):
        _, cut = conditioner.encode_prompts(["short", kept + " A Worm's Tail"], most_chunks=2)
    assert [record.getMessage() for record in caplog.records] == [
        'The prompt exceeds 150 tokens; this end of it was left out: "A Worm\'s Tail"'
    ]
    assert torch.equal(cut.tokens, conditioner.encode_prompts(["short", kept])[1].tokens)


def test_cut_prompt_is_quoted_with_its_weights(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    conditioner.encode_prompts(["a" * 70 + r" (bc\(d Efg:1.2) (h:0.5)"], weighting=True, most_chunks=1)
    assert caplog.records[0].getMessage().endswith(r"left out: 'bc\\(d Efg:1.2) (h:0.5)'")


def test_cut_prompt_is_not_quoted_where_prompts_are_private(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    conditioner = Conditioner(components["tokenizer"], components["text_encoder"], log_prompts=False)
    conditioner.encode_prompts(["a" * 75 + "secret"], most_chunks=1)
    assert [record.getMessage() for record in caplog.records] == ["The prompt exceeds 75 tokens; 6 were left out."]


def test_of_a_long_cut_200_characters_are_quoted(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    long = "cut " * 2000
    conditioner.encode_prompts(["a" * 75 + " " + long], most_chunks=1)
    (record,) = caplog.records
    assert record.getMessage().endswith(repr(long[:200] + "..."))


def test_prompt_that_fits_exactly_is_not_warned_of(conditioner: Conditioner, caplog: pytest.LogCaptureFixture) -> None:
    conditioner.encode_prompts(["a" * 75], most_chunks=1)
    assert caplog.text == ""
    conditioner.encode_prompts(["a" * 76], most_chunks=1)
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
