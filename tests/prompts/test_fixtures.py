"""Tokens, weights, hidden states and Stage C's outputs against ComfyUI's.

`CASCADE_PROMPT_FIXTURES=FOLDER` tests another folder of the same form, and `CASCADE_PROMPT_FIXTURES_SEED=N` says with which seed
its networks' weights were made.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.limits import InputError
from cascade.prompts.chunks import Chunk, chunks
from cascade.prompts.embeddings import PICKLES, SUFFIX, Embeddings
from cascade.prompts.encoding import encode, encoder_of
from cascade.prompts.parsing import HIGHEST, LOWEST, parse
from cascade.prompts.pieces import pieces
from cascade.prompts.reading import special_of
from cascade.prompts.text import TextEmbeddings, joined, repeated
from cascade.stages.text import TextEncoder
from tests.prompts import comfyui
from tests.prompts.comfyui import PAIRS, PROMPTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    """ComfyUI's, with the pickles converted."""
    return Embeddings(comfyui.width(), comfyui.converted(tmp_path_factory.mktemp("prompts") / "embeddings"))


@pytest.fixture(scope="module")
def encoder(embeddings: Embeddings) -> TextEncoder:
    return TextEncoder(comfyui.tokenizer(), comfyui.text_encoder(), embeddings=embeddings)


def out_of_range(name: str) -> bool:
    weights = comfyui.tensors("prompts")[f"{name}.weights"]
    return not bool(((weights >= LOWEST) & (weights <= HIGHEST)).all())  # nan lies nowhere


def missing(name: str) -> bool:
    return any("does not exist" in warning for warning in PROMPTS[name].get("warnings", ()))


def used(name: str) -> set[Path]:
    return {comfyui.file_of(embedding) for embedding, _ in PROMPTS[name].get("vectors", ())}


def pickled(name: str) -> bool:
    return any(path.suffix in PICKLES for path in used(name))


def of_another_width(name: str) -> bool:
    files = [path for path in used(name) if path.suffix == SUFFIX]
    return any(comfyui.width() not in comfyui.widths(path) for path in files)


def refusals(name: str) -> list[str]:
    """What our errors say of a prompt, as far as the rules of refusal concern it."""
    rules = {
        "has the weight": out_of_range(name),
        "which this model does not have": missing(name),
        "convert it with scripts/convert-embedding": pickled(name),
        "made for another model": of_another_width(name),
    }
    return [words for words, concerned in rules.items() if concerned]


def read(name: str, embeddings: Embeddings) -> list[Chunk]:
    """The chunks of a prompt, whatever its weights are."""
    found = pieces(parse(PROMPTS[name]["text"]), comfyui.tokenizer(), embeddings, strict=True)
    return chunks(found)


@torch.no_grad()
def encoded(*prompts: list[Chunk]) -> list[TextEmbeddings]:
    special = special_of(comfyui.tokenizer())
    return encode(prompts, special, encoder_of(comfyui.text_encoder()), CPU, torch.float32, ends_early=True)


def ids(of: list[Chunk]) -> Tensor:
    """ComfyUI's ids, with -1, -2 ... for vectors."""
    special = special_of(comfyui.tokenizer())
    made, vectors = [], 0
    for chunk in of:
        row = chunk.ids(special)
        for place, token in enumerate(chunk.tokens, 1):
            if token.vector is not None:
                vectors += 1
                row[place] = -vectors
        made.append(row)
    return torch.tensor(made, dtype=torch.int32)


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompt_fixture(name: str, embeddings: Embeddings, encoder: TextEncoder) -> None:
    text, data, special = PROMPTS[name]["text"], comfyui.tensors("prompts"), special_of(comfyui.tokenizer())
    if refusals(name):
        strict = TextEncoder(
            comfyui.tokenizer(),
            comfyui.text_encoder(),
            embeddings=Embeddings(comfyui.width(), comfyui.EMBEDDINGS),
        )
        with pytest.raises(InputError) as error:
            strict.encode_each([text], weighting=True)
        assert any(words in str(error.value) for words in refusals(name))
    if missing(name) or of_another_width(name):
        return
    made = read(name, embeddings)
    assert len(made) == PROMPTS[name]["chunks"]
    assert torch.equal(ids(made), data[f"{name}.tokens"])
    mask = torch.tensor([chunk.mask(special, ends_early=True) for chunk in made], dtype=torch.uint8)
    assert torch.equal(mask, data[f"{name}.mask"])
    weights, expected = torch.tensor([chunk.all_weights(special) for chunk in made]), data[f"{name}.weights"]
    torch.testing.assert_close(weights, expected, atol=0, rtol=1e-6, equal_nan=True)
    (states,) = encoded(made)
    expected = data[f"{name}.cond"]
    largest = expected.nan_to_num(0, 0, 0).abs().max().item()
    comfyui.close(states.tokens[0], expected, 1e-5 * largest)
    comfyui.close(states.pooled[0], data[f"{name}.pooled"], 1e-4)
    if not out_of_range(name):
        (whole,) = encoder.encode_each([text], weighting=True)
        assert torch.equal(whole.tokens, states.tokens)
        assert torch.equal(whole.pooled, states.pooled)


@torch.no_grad()
def predicted(*texts: TextEmbeddings) -> Tensor:
    """What Stage C makes of some texts, as one batch."""
    data, network = comfyui.tensors("pairs"), comfyui.stage_c()
    together = joined(texts)
    x, r, images = (data[name].expand(len(texts), *data[name].shape[1:]) for name in ("x", "r", "clip_img"))
    conditions = network.condition(
        together.pooled, together.tokens, images, clip_text_bias=together.bias, clip_text_lengths=together.lengths
    )
    return network(x, r, conditions)


@pytest.mark.parametrize("i", range(len(PAIRS)))
def test_prompt_fixture_pairs(i: int, embeddings: Embeddings) -> None:
    names = [PAIRS[i]["positive"], PAIRS[i]["negative"]]
    if any(missing(name) or of_another_width(name) for name in names):
        return
    data = comfyui.tensors("pairs")
    texts = encoded(*(read(name, embeddings) for name in names))
    assert [text.tokens.shape[1] for text in texts] == PAIRS[i]["tokens"]
    comfyui.close(predicted(*texts), data[f"{i}.alone"], 1e-4)
    counted = repeated(*texts)
    times = [1 if text.bias is None else math.exp(text.bias[0, 0]) for text in counted]
    run = [text.tokens.shape[1] * round(number) for text, number in zip(counted, times, strict=True)]
    assert run == PAIRS[i]["tokens_run"]
    comfyui.close(predicted(*counted), data[f"{i}.out"], 1e-4)
