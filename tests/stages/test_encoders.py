"""Text and image encoders against diffusers' own prior pipeline, and its behaviour at the edges."""

import logging
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_cascade import StableCascadePriorPipeline
from PIL import Image

from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.text import joined
from cascade.stages.text import TextEncoder
from tests.components import make_their_processor

PROMPTS = ["A Red Apple on a green background", "", "don't", "x" * 90, "  two\n  lines, 3 words "]


@pytest.fixture(scope="module")
def encoder(components: dict[str, Any]) -> TextEncoder:
    return TextEncoder(components["tokenizer"], components["text_encoder"])


@pytest.fixture(scope="module")
def image_encoder(components: dict[str, Any]) -> ImagePromptEncoder:
    return ImagePromptEncoder(components["feature_extractor"], components["image_encoder"])


@pytest.fixture(scope="module")
def pipeline(components: dict[str, Any]) -> StableCascadePriorPipeline:
    parts = {name: components[name] for name in ("tokenizer", "text_encoder", "image_encoder")}
    return StableCascadePriorPipeline(**parts, feature_extractor=make_their_processor(), prior=None, scheduler=None)


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


@torch.no_grad()
def test_text_equals_diffusers(encoder: TextEncoder, pipeline: StableCascadePriorPipeline) -> None:
    tokens, pooled, *_ = pipeline.encode_prompt("cpu", len(PROMPTS), 1, False, prompt=PROMPTS)
    ours = joined(encoder.encode_each(PROMPTS, most_chunks=1))
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


@torch.no_grad()
@pytest.mark.parametrize("weighting", [False, True])
def test_short_prompts_are_encoded_as_transformers_does(encoder: TextEncoder, weighting: bool) -> None:
    """To the bit: neither chunks nor weights of 1 change them."""
    prompts = ["a red apple", "", "a" * 75]
    batch = encoder.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    expected = encoder.encoder(**batch, output_hidden_states=True)
    ours = encoder.encode(prompts, weighting=weighting)
    assert torch.equal(ours.tokens, expected.hidden_states[-1])
    assert torch.equal(ours.pooled[:, 0], expected.text_embeds)
    assert ours.bias is None


def test_long_prompts_are_encoded_in_chunks(encoder: TextEncoder) -> None:
    first, second = "a" * 75, " " + "b" * 10
    long, short = encoder.encode_each([first + second, "c"])
    assert [long.tokens.shape, short.tokens.shape] == [(1, 154, 32), (1, 77, 32)]
    parts = encoder.encode([first, second])
    torch.testing.assert_close(long.tokens[0], parts.tokens.flatten(0, 1))
    torch.testing.assert_close(long.pooled, parts.pooled[:1])
    # The engine itself has no limit.
    (longest,) = encoder.encode_each(["a" * 751])
    assert longest.tokens.shape == (1, 77 * 11, 32)


def test_texts_of_unlike_lengths_in_one_batch(encoder: TextEncoder) -> None:
    prompts = ["a" * 200, "b", "c" * 100]
    together = encoder.encode(prompts)
    assert together.tokens.shape == (3, 231, 32)
    for row, (one, length) in enumerate(zip(encoder.encode_each(prompts), (231, 77, 154), strict=True)):
        assert torch.equal(together.tokens[row, :length], one.tokens[0])
        assert not together.tokens[row, length:].any()
    assert together.bias is None
    assert together.lengths.tolist() == [231, 77, 154]


@pytest.fixture(scope="module")
def empty(encoder: TextEncoder) -> torch.Tensor:
    return encoder.encode([""]).tokens[0]


@pytest.mark.parametrize("weight", [0, -1, 0.5, 1.1, 4])
def test_weights(encoder: TextEncoder, empty: torch.Tensor, weight: float) -> None:
    """e + w (z - e) for the words in brackets. All others, end of text, padding and the pooled text: to the bit as without."""
    weighted = encoder.encode([f"a (bc:{weight}) d"], weighting=True)
    plain = encoder.encode(["a bc d"])
    inside = slice(2, 4)
    expected = empty[inside] + weight * (plain.tokens[0, inside] - empty[inside])
    torch.testing.assert_close(weighted.tokens[0, inside], expected)
    for outside in (slice(0, 2), slice(4, 77)):
        assert torch.equal(weighted.tokens[0, outside], plain.tokens[0, outside])
    assert torch.equal(weighted.pooled, plain.pooled)


def test_weights_act_on_the_pooled_text_on_demand(encoder: TextEncoder) -> None:
    def pooled(prompt: str, weight_pooled: bool = True) -> torch.Tensor:
        (text,) = encoder.encode_each([prompt], weighting=True, weight_pooled=weight_pooled)
        return text.pooled

    whole, without_b, without_c = pooled("a b c d"), pooled("a c d"), pooled("a b d")
    assert torch.equal(pooled("a (b:2) c d", False), whole)
    torch.testing.assert_close(pooled("a (b:0) c d"), without_b)
    torch.testing.assert_close(pooled("a (b:1.5) c d"), whole + 0.5 * (whole - without_b))
    expected = whole - 0.5 * (whole - without_b) + 0.2 * (whole - without_c)
    torch.testing.assert_close(pooled("a (b:.5) (c:1.2) d"), expected)
    torch.testing.assert_close(pooled("a (b:0) (c:0) d"), pooled("a d"))
    # What ComfyUI weights is as without.
    states = [
        encoder.encode_each(["a (b:2) c", "", "(a:0) d"], weighting=True, weight_pooled=one) for one in (False, True)
    ]
    for one, other in zip(*states, strict=True):
        assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(states[0][1].pooled, states[1][1].pooled)
    torch.testing.assert_close(states[1][2].pooled, pooled("d"))


def test_weights_of_later_chunks(encoder: TextEncoder, empty: torch.Tensor) -> None:
    """The empty prompt's state at the same place of 77."""
    weighted = encoder.encode(["a" * 75 + "(bc:0)"], weighting=True).tokens[0]
    assert torch.equal(weighted[:77], encoder.encode(["a" * 75 + " bc"]).tokens[0, :77])
    assert torch.equal(weighted[78:80], empty[1:3])


def test_without_weighting_brackets_are_text(encoder: TextEncoder) -> None:
    def ids(prompt: str, weighting: bool) -> list[int]:
        return [token.id for chunk in encoder.read(prompt, weighting=weighting) for token in chunk.tokens]

    prompt = r"a ((bc:1.3) \(d"
    assert ids(prompt, False) == encoder.tokenizer(prompt).input_ids[1:-1]
    assert ids(prompt, True) != ids(prompt, False)


def test_embeddings_stand_for_words(components: dict[str, Any]) -> None:
    """A word's own vector makes the states that the word makes; a name may also come with the call."""
    tokenizer, text_encoder = components["tokenizer"], components["text_encoder"]
    ids = tokenizer(["xy"]).input_ids[0][1:-1]
    vectors = text_encoder.get_input_embeddings().weight[ids].detach()
    expected = TextEncoder(tokenizer, text_encoder).encode(["a xy b"])
    loaded = TextEncoder(tokenizer, text_encoder, embeddings=Embeddings(32, words={"style": vectors}))
    named = TextEncoder(tokenizer, text_encoder)
    without = named.encode(["a b"])
    for weighting in (False, True):
        prompt = "a embedding:style b"
        (by_call,) = named.encode_each([prompt], weighting=weighting, words={"style": vectors})
        for made in (loaded.encode([prompt], weighting=weighting), by_call):
            assert torch.equal(made.tokens, expected.tokens)
            assert torch.equal(made.pooled, expected.pooled)
    assert torch.equal(named.encode(["a b"]).tokens, without.tokens)  # the vectors of a call end with it


def test_cut_prompt_is_quoted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    kept = "a" * 145 + " Apple"  # 150 tokens, which fill two chunks
    with caplog.at_level(logging.WARNING, "cascade"):
        _, cut = encoder.encode_each(["short", kept + " A Worm's Tail"], most_chunks=2)
    assert [record.getMessage() for record in caplog.records] == [
        'The prompt exceeds 150 tokens; this end of it was left out: "A Worm\'s Tail"'
    ]
    assert torch.equal(cut.tokens, encoder.encode_each(["short", kept])[1].tokens)


def test_cut_prompt_is_quoted_with_its_weights(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode_each(["a" * 70 + r" (bc\(d Efg:1.2) (h:0.5)"], weighting=True, most_chunks=1)
    assert caplog.records[0].getMessage().endswith(r"left out: 'bc\\(d Efg:1.2) (h:0.5)'")


def test_cut_prompt_is_not_quoted_where_prompts_are_private(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = TextEncoder(components["tokenizer"], components["text_encoder"], log_prompts=False)
    encoder.encode_each(["a" * 75 + "secret"], most_chunks=1)
    assert [record.getMessage() for record in caplog.records] == ["The prompt exceeds 75 tokens; 6 were left out."]


def test_of_a_long_cut_200_characters_are_quoted(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "cut " * 2000
    encoder.encode_each(["a" * 75 + " " + long], most_chunks=1)
    (record,) = caplog.records
    assert record.getMessage().endswith(repr(long[:200] + "..."))


def test_prompt_that_fits_exactly_is_not_warned_of(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode_each(["a" * 75], most_chunks=1)
    assert caplog.text == ""
    encoder.encode_each(["a" * 76], most_chunks=1)
    assert "left out: 'a'" in caplog.text


def test_no_gradients_are_kept(encoder: TextEncoder, image_encoder: ImagePromptEncoder) -> None:
    embeddings = encoder.encode(["an apple"])
    assert not embeddings.tokens.requires_grad
    assert not image_encoder.encode([gradient(32, 32)]).requires_grad


def test_a_bare_text_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(TypeError, match="'an apple'"):
        encoder.encode("an apple")
