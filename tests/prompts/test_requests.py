"""Long and weighted prompts and embeddings, from a request to its pictures."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cascade import Cascade, Progress, Request
from cascade.limits import InputError
from cascade.prompts.embeddings import Embeddings
from tests.tiny import make_cascade

SMALL = {"width": 72, "height": 64, "steps_prior": 2, "steps_decoder": 1}
LONG = "a cat, " * 30  # 150 tokens
PHOTO = Image.linear_gradient("L").resize((72, 64))


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    made = make_cascade(components)
    folder = tmp_path_factory.mktemp("embeddings")
    ids = made.text.tokenizer(["dog"], add_special_tokens=False).input_ids[0]
    vectors = made.text.encoder.get_input_embeddings().weight[ids].detach()
    save_file({"clip_g": vectors}, folder / "animal.safetensors")
    made.text.embeddings = Embeddings(32, folder)
    return made


def semantic(cascade: Cascade, *requests: Request) -> Tensor:
    """The latents of Stage C, one for each request, made in one batch."""
    seen: list[Progress] = []
    cascade.batch(requests, seen.append)
    return [progress.latents for progress in seen if progress.stage == "prior"][-1]


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize(
    "common",
    [
        {},
        {"repeat_prompts": True},
        {"prompt_weighting": True},
        {"guidance_scale_prior": 1, "guidance_scale_decoder": 1},
        {"image_prompts": (PHOTO, PHOTO)},
        {"image": PHOTO, "prompt_strength": 0.5},
    ],
    ids=["text", "repeated", "weighted", "no guidance", "image prompts", "image"],
)
def test_a_batch_of_unlike_lengths_is_each_alone(cascade: Cascade, common: dict[str, Any]) -> None:
    requests = [
        Request("a cat (on: 0.5) a hill", LONG, seed=3, **SMALL, **common),
        Request(LONG + "(dog:1.2)", "rain", seed=5, **SMALL, **common),
        Request("an embedding:animal", LONG * 2, seed=7, **SMALL, **common),
    ]
    together = semantic(cascade, *requests)
    for row, request in enumerate(requests):
        assert close(together[row : row + 1], semantic(cascade, request))


def test_the_end_of_a_long_prompt_counts(cascade: Cascade) -> None:
    one, other = (semantic(cascade, Request(LONG + end, **SMALL)) for end in ("dog", "fox"))
    assert not close(one, other)


def test_brackets_are_text_unless_asked_for(cascade: Cascade) -> None:
    plain, weighted, words = (
        semantic(cascade, Request(prompt, prompt_weighting=weighting, **SMALL))
        for prompt, weighting in (("a (cat)", False), ("a (cat:1)", True), ("a cat", False))
    )
    assert torch.equal(weighted, words)
    assert not close(plain, words)


def test_weights_act_on_both_prompts(cascade: Cascade) -> None:
    request = Request("a cat", "a dog", prompt_weighting=True, **SMALL)
    made = [
        semantic(cascade, one)
        for one in (request, replace(request, prompt="a (cat:2)"), replace(request, negative_prompt="a (dog:2)"))
    ]
    assert not close(made[0], made[1])
    assert not close(made[0], made[2])


def test_stage_b_sees_weights_through_the_pooled_text_alone(cascade: Cascade) -> None:
    def decoded(**options: Any) -> Tensor:
        seen: list[Progress] = []
        # The same semantic latents, whatever the prompt.
        start = {"image": PHOTO, "prompt_strength": 0.0}
        cascade.generate(Request("a (cat:2)", prompt_weighting=True, **start, **SMALL, **options), seen.append)
        return [progress.latents for progress in seen if progress.stage == "decoder"][-1]

    plain = decoded()
    assert torch.equal(plain, decoded(weight_pooled=False))
    assert not close(plain, decoded(weight_pooled=True))


def test_an_embedding_is_the_word_whose_vectors_it_has(cascade: Cascade) -> None:
    for weighting in (False, True):
        made = [
            semantic(cascade, Request(prompt, negative, prompt_weighting=weighting, **SMALL))
            for prompt, negative in (("a dog", "dog"), ("a embedding:animal", "embedding:animal"))
        ]
        assert torch.equal(*made)


def test_repetition_is_what_comfyui_does(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter text twice: as if its hidden states stood there twice."""
    request = Request(LONG * 2, "rain", **SMALL)
    ours = semantic(cascade, replace(request, repeat_prompts=True))
    apart = semantic(cascade, request)
    encode = cascade.text.encode_each

    def twice(*args: Any, **options: Any) -> list[Any]:
        text, negative = encode(*args, **options)
        assert text.tokens.shape[1] == 77 * 4
        return [text, negative._replace(tokens=negative.tokens.repeat(1, 4, 1))]

    monkeypatch.setattr(cascade.text, "encode_each", twice)
    assert close(ours, semantic(cascade, request))
    assert not close(ours, apart)


def test_beyond_300_tokens_prompts_are_cut(cascade: Cascade, caplog: pytest.LogCaptureFixture) -> None:
    kept = "a" * 150 + " " + "b" * 150
    with caplog.at_level(logging.WARNING, "cascade"):
        cut = semantic(cascade, Request(kept + " and more", kept + " less", **SMALL))
    assert [record.getMessage() for record in caplog.records] == [
        "The prompt exceeds 300 tokens; this end of it was left out: 'and more'",
        "The prompt exceeds 300 tokens; this end of it was left out: 'less'",
    ]
    assert torch.equal(cut, semantic(cascade, Request(kept, kept, **SMALL)))


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("weight", ["nan", "-inf", "4.5", "-5"])
def test_weights_out_of_range(name: str, weight: str) -> None:
    texts = {"prompt": "a cat", name: f"a (dog:{weight})"}
    Request(**texts)
    with pytest.raises(InputError) as error:
        Request(**texts, prompt_weighting=True)
    assert str(error.value).startswith(f"{name} has the weight ")
    assert f"at character 2, in '(dog:{weight})'; " in str(error.value)


def test_a_missing_embedding_fails_before_anything_is_made(cascade: Cascade) -> None:
    request = Request("a cat", "embedding:fox", **SMALL)
    assert len(cascade.generate(request)) == 1
    weighted = replace(request, prompt_weighting=True)
    message = "negative_prompt names the embedding 'fox', which this model does not have: it has animal."
    with pytest.raises(InputError) as error:
        next(cascade.steps(weighted))
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        cascade.batch([replace(weighted, negative_prompt=""), weighted])
    assert str(error.value) == f"requests[1].{message}"


def test_embeddings_lie_in_the_model_folder(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "embeddings").mkdir()
    loaded = Cascade.load(folder, "cpu")
    request = Request("a embedding:style", prompt_weighting=True, **SMALL)
    with pytest.raises(InputError, match="does not have: it has none"):
        loaded.generate(request)
    # Files may come and go while the model is loaded.
    save_file({"emb_params": torch.randn(2, 32)}, folder / "embeddings" / "style.safetensors")
    (image,) = loaded.generate(request)
    (other,) = loaded.generate(replace(request, prompt="a"))
    assert not np.array_equal(np.asarray(image), np.asarray(other))
    save_file({"emb_params": torch.randn(2, 31)}, folder / "embeddings" / "style.safetensors")
    for weighting in (False, True):
        with pytest.raises(InputError) as error:
            loaded.generate(replace(request, prompt_weighting=weighting))
        assert str(error.value) == (
            "prompt names the embedding 'style', but style.safetensors has vectors of 31 numbers, and this model's text "
            "encoder takes 32: it was made for another model."
        )


def test_padding_is_hidden_in_stage_c(cascade: Cascade) -> None:
    """In a request of unlike lengths; in one of like lengths, there is none."""
    seen = []
    condition = type(cascade.prior).condition

    def watched(network: Any, *args: Any, **options: Any) -> Any:
        made = condition(network, *args, **options)
        seen.append((made.bias, made.hidden))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cascade.prior), "condition", watched)
        semantic(cascade, Request("a cat", LONG * 2, **SMALL))
        semantic(cascade, Request("a cat", "rain", **SMALL))
    ((bias, hidden), _), (alike, _) = seen[:2], seen[2:]
    assert bias is None
    assert hidden.tolist() == [[77, 231], [308, 0]]
    assert alike == (None, None)
