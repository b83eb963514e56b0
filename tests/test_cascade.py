"""The chain: requests, progress, randomness, sizes."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade import sizes
from cascade.cascade import Cascade, Progress, Request, to_image, to_pixels
from cascade.controls import Control
from cascade.sampling import Noise, diffuse
from cascade.weights import CONTROLNETS, WeightsError
from tests.tiny import count_calls, make_cascade

SMALL = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 2}


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def read(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def photo(width: int, height: int) -> Image.Image:
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return to_image(torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0])


def test_loaded_from_a_folder_it_makes_pictures(model_folder: Path) -> None:
    cascade = Cascade.load(model_folder, device="cpu")
    assert cascade.prior.dtype == torch.float32
    assert cascade.device == torch.device("cpu")
    assert cascade.conditioner.image_encoder is not None
    images = cascade.generate(Request("a cat", num_images=2))
    assert [(image.size, image.mode) for image in images] == [((128, 128), "RGB")] * 2
    (preview,) = cascade.preview(torch.zeros(1, 16, 3, 4))
    assert preview.size == (32, 24)
    assert cascade.reconstruct(photo(90, 70)).size == (90, 70)


def test_bfloat16(model_folder: Path) -> None:
    cascade = Cascade.load(model_folder, device="cpu", dtype=torch.bfloat16)
    assert cascade.decoder.dtype == torch.bfloat16
    for progress in cascade.steps(Request("a cat", **SMALL)):
        assert progress.latents is None or progress.latents.dtype == torch.float32
    assert progress.image.size == (64, 64)


def test_optional_components_may_be_missing(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "model.json").read_text())
    for name in ("effnet", "previewer", "image_encoder", "feature_extractor", *CONTROLNETS):
        shutil.rmtree(folder / name)
        content["files"] = {path: value for path, value in content["files"].items() if not path.startswith(f"{name}/")}
    (folder / "model.json").write_text(json.dumps(content))
    cascade = Cascade.load(folder, device="cpu")
    assert len(cascade.generate(Request("a cat", **SMALL))) == 1
    with pytest.raises(ValueError, match="no previewer"):
        cascade.preview(torch.zeros(1, 16, 2, 2))
    with pytest.raises(ValueError, match=r"no semantic encoder.*--with effnet, then scripts/save-weights, add it\."):
        cascade.generate(Request("a cat", image=photo(64, 64), **SMALL))
    with pytest.raises(
        ValueError, match=r"no image encoder.*--with image-encoder, then scripts/save-weights, add it\."
    ):
        cascade.generate(Request("a cat", image_prompts=(photo(64, 64),), **SMALL))
    with pytest.raises(
        ValueError,
        match=r"no controlnet_canny, .*for a Stage C of width 2048, and this model's has 16\. Kinds .*: none\.",
    ):
        cascade.generate(Request("a cat", controls=(Control("canny", photo(64, 64)),), **SMALL))


def test_a_needed_component_may_not(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    shutil.rmtree(folder / "decoder")
    with pytest.raises(WeightsError, match="decoder"):
        Cascade.load(folder, device="cpu")


def test_progress_counts_all_work(cascade: Cascade) -> None:
    request = Request("a cat", num_images=5, **{**SMALL, "steps_decoder": 1})
    progress = list(cascade.steps(request))
    batch = ["prior", "prior", "decoder"]
    assert [one.stage for one in progress] == [*batch, *["image"] * 4, *batch, "image"]
    assert [one.done for one in progress] == list(range(1, len(progress) + 1))
    assert {one.total for one in progress} == {len(progress)}
    for one in progress:
        assert (one.image is None) == (one.stage != "image")
        assert (one.latents is None) == (one.stage == "image")
    assert [tuple(one.latents.shape) for one in progress[:3]] == [(4, 16, 2, 2)] * 2 + [(4, 4, 16, 16)]


def test_whoever_iterates_may_stop(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_calls(cascade.prior, monkeypatch)
    steps = cascade.steps(Request("a cat", **{**SMALL, "steps_prior": 9}))
    for _ in itertools.islice(steps, 2):
        pass
    steps.close()
    assert len(forwards) == 2

    def cancel(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cascade.generate(Request("a cat", **{**SMALL, "steps_prior": 9}), cancel)
    assert len(forwards) == 5


def test_text_is_encoded_once(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(cascade.conditioner.text_encoder, monkeypatch)
    cascade.generate(Request("a cat", num_images=6, **SMALL))
    assert calls == [2]
    cascade.generate(Request("a cat", guidance_scale_prior=1.0, guidance_scale_decoder=0.0, **SMALL))
    assert calls == [2, 1]


def test_model_folder_decides_what_the_request_leaves_open(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, decoder = count_calls(cascade.prior, monkeypatch), count_calls(cascade.decoder, monkeypatch)
    (image,) = cascade.generate(Request("a cat"))
    assert image.size == (128, 128)
    assert (prior, decoder) == ([2] * 3, [2] * 2)
    cascade.generate(Request("a cat", width=64, guidance_scale_prior=1, guidance_scale_decoder=0, steps_prior=1))
    assert (prior[3:], decoder[2:]) == ([1], [1] * 2)


def test_every_input_changes_the_picture(cascade: Cascade) -> None:
    requests = [
        Request("a cat", **SMALL),
        Request("a dog", **SMALL),
        Request("a cat", "fog", **SMALL),
        Request("a cat", seed=1, **SMALL),
        Request("a cat", guidance_scale_prior=9.0, **SMALL),
        Request("a cat", guidance_scale_decoder=5.0, **SMALL),
        Request("a cat", sampler="ddim", **SMALL),
        Request("a cat", sampler="lcm", **SMALL),
        Request("a cat", **{**SMALL, "steps_prior": 3}),
        Request("a cat", **{**SMALL, "steps_decoder": 3}),
    ]
    assert len({cascade.generate(request)[0].tobytes() for request in requests}) == len(requests)


def test_every_image_input_changes_the_picture(cascade: Cascade) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    several = {**SMALL, "steps_prior": 6}
    requests = [
        Request("a cat", **several),
        Request("a cat", image_prompts=(red,), **several),
        Request("a cat", image_prompts=(blue,), **several),
        Request("a cat", image_prompts=(red, blue), **several),
        Request("a cat", image_prompts=(red, blue), image_prompt_strengths=(1.0, 0.5), **several),
        Request("a cat", image_prompts=(red,), image_prompt_strengths=(2.0,), **several),
        *(Request("a cat", image=red, prompt_strength=strength, **several) for strength in (0.0, 0.3, 0.7, 0.9)),
        Request("a cat", image=blue, prompt_strength=0.3, **several),
        Request("a cat", image=blue, image_prompts=(red,), prompt_strength=0.3, **several),
    ]
    assert len({cascade.generate(request)[0].tobytes() for request in requests}) == len(requests)


def test_an_image_prompt_of_no_strength_says_nothing(cascade: Cascade) -> None:
    silent = Request("a cat", image_prompts=(photo(64, 64),), image_prompt_strengths=(0.0,), **SMALL)
    (first,), (second,) = cascade.generate(silent), cascade.generate(Request("a cat", **SMALL))
    assert first.tobytes() == second.tobytes()


def test_images_are_encoded_once_a_request(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = count_calls(cascade.conditioner.image_encoder, monkeypatch)
    sources = count_calls(cascade.effnet, monkeypatch)
    cascade.generate(
        Request("a cat", num_images=6, image=photo(64, 64), image_prompts=(photo(64, 64), photo(90, 40)), **SMALL)
    )
    assert (prompts, sources) == ([2], [1])


@pytest.mark.parametrize(
    ("strength", "steps"), [(1.0, 10), (0.8, 8), (0.55, 5), (0.1, 1), (0.01, 1), (5e-324, 1), (0.0, 0)]
)
def test_as_many_steps_as_belong_to_the_strength(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, strength: float, steps: int
) -> None:
    forwards = count_calls(cascade.prior, monkeypatch)
    request = Request("a cat", image=photo(64, 64), prompt_strength=strength, **{**SMALL, "steps_prior": 10})
    progress = list(cascade.steps(request))
    assert len(forwards) == sum(one.stage == "prior" for one in progress) == steps
    assert [one.done for one in progress] == list(range(1, len(progress) + 1))
    assert {one.total for one in progress} == {steps + 2 + 1}


def test_strength_0_is_a_reconstruction(cascade: Cascade) -> None:
    request = Request("a cat", image=photo(128, 64), width=128, height=64, prompt_strength=0.0, seed=3)
    (image,) = cascade.generate(request)
    assert image.tobytes() == cascade.reconstruct(photo(128, 64), seed=3, prompt="a cat").tobytes()


def test_the_notebook_noises_at_shift_1_what_it_samples_at_2(components: dict[str, Any]) -> None:
    """Image-to-image only; and there, what Stage C begins with is all that differs."""
    starts, pictures = {}, {}
    for numerics in ("official", "notebook"):
        cascade, seen = make_cascade(components, numerics=numerics), []
        cascade.prior.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][:1]))
        cascade.generate(Request("a cat", image=photo(64, 64), prompt_strength=0.8, **SMALL))
        starts[numerics] = seen[0]
        pictures[numerics] = cascade.generate(Request("a cat", **SMALL))[0].tobytes()
    source = cascade.encode(photo(64, 64))
    noise = Noise([0])(16, 2, 2)
    for numerics, shift in (("official", 2.0), ("notebook", 1.0)):
        expected = diffuse(source, noise, torch.tensor(0.8), shift)
        torch.testing.assert_close(starts[numerics], expected)
    assert pictures["official"] == pictures["notebook"]


def test_strength_1_begins_with_noise(cascade: Cascade) -> None:
    """But for the 1% of the image that the schedule leaves."""
    with_image = Request("a cat", image=photo(64, 64), prompt_strength=1.0, **SMALL)
    (first,), (second,) = cascade.generate(with_image), cascade.generate(Request("a cat", **SMALL))
    (other,) = cascade.generate(Request("a cat", seed=1, **SMALL))
    assert np.abs(read(first) - read(second)).mean() < 0.2 * np.abs(read(other) - read(second)).mean()


@pytest.mark.parametrize(
    ("image", "asked", "expected"),
    [
        ((300, 300), {}, (128, 128)),
        ((40, 80), {}, (88, 184)),
        ((1, 1), {}, (128, 128)),
        ((400, 200), {"width": 100}, (100, 64)),
        ((200, 400), {"width": 72}, (72, 144)),
        ((200, 400), {"width": 90, "height": 65}, (90, 65)),
    ],
)
def test_pictures_have_the_shape_of_the_image(
    cascade: Cascade, image: tuple[int, int], asked: dict[str, int], expected: tuple[int, int]
) -> None:
    (made,) = cascade.generate(Request("a cat", image=photo(*image), steps_prior=1, steps_decoder=1, **asked))
    assert made.size == expected


def test_of_an_image_of_another_shape_the_middle_is_used(cascade: Cascade) -> None:
    long = Image.new("RGB", (192, 64), "black")
    long.paste(photo(64, 64), (64, 0))
    squeezed = long.resize((64, 64))
    first, second, third = (
        cascade.generate(Request("a cat", image=image, prompt_strength=0.2, **SMALL))[0]
        for image in (long, photo(64, 64), squeezed)
    )
    assert first.tobytes() == second.tobytes() != third.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_any_mode(cascade: Cascade, mode: str) -> None:
    image = Image.new("L", (64, 64), 200).convert(mode)
    made = cascade.generate(Request("a cat", image=image, image_prompts=(image,), **SMALL))
    assert made[0].size == (64, 64)


def test_images_do_not_break_the_seeds(components: dict[str, Any]) -> None:
    request = Request("a cat", num_images=3, seed=3, image=photo(64, 64), image_prompts=(photo(64, 64),), **SMALL)
    first, second = (make_cascade(components, max_batch=batch).generate(request) for batch in (1, 3))
    alone = make_cascade(components).generate(replace(request, num_images=1, seed=5))
    assert len({image.tobytes() for image in second}) == 3
    for one, other in zip([*first, *alone], [*second, second[2]], strict=True):
        assert np.abs(read(one) - read(other)).max() <= 1


def test_negative_prompt_needs_guidance(cascade: Cascade) -> None:
    off = {"guidance_scale_prior": 1.0, "guidance_scale_decoder": 1.0, **SMALL}
    first, second = (cascade.generate(Request("a cat", negative, **off))[0] for negative in ("", "fog"))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_picture_i_of_a_seed_is_picture_0_of_the_seed_i_higher(cascade: Cascade, sampler: str) -> None:
    together = cascade.generate(Request("a cat", seed=3, num_images=6, sampler=sampler, **SMALL))
    assert len({image.tobytes() for image in together}) == 6
    for i, image in enumerate(together):
        (alone,) = cascade.generate(Request("a cat", seed=3 + i, sampler=sampler, **SMALL))
        assert np.abs(read(image) - read(alone)).max() <= 1


def test_batches_do_not_change_pictures(components: dict[str, Any]) -> None:
    request = Request("a cat", num_images=3, **SMALL)
    first, second = (make_cascade(components, max_batch=batch).generate(request) for batch in (1, 3))
    for one, other in zip(first, second, strict=True):
        assert np.abs(read(one) - read(other)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 72), (333, 100), (277, 64), (65, 127), (1088, 64)])
def test_odd_sizes(cascade: Cascade, width: int, height: int) -> None:
    (image,) = cascade.generate(Request("a cat", width=width, height=height, steps_prior=1, steps_decoder=1))
    assert image.size == (width, height)


@settings(max_examples=12, deadline=None)
@given(width=st.integers(64, 300), height=st.integers(64, 300))
def test_any_size(cascade: Cascade, width: int, height: int) -> None:
    (image,) = cascade.generate(Request("a cat", width=width, height=height, steps_prior=1, steps_decoder=1))
    assert image.size == (width, height)


def test_sizes_that_are_no_multiples_are_cropped_centrally(cascade: Cascade) -> None:
    short = {"steps_prior": 1, "steps_decoder": 1}
    (whole,) = cascade.generate(Request("a cat", width=104, height=72, **short))
    (cut,) = cascade.generate(Request("a cat", width=100, height=67, **short))
    assert cut.tobytes() == whole.crop((2, 2, 102, 69)).tobytes()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 75), (128, 200)])
def test_encode_and_reconstruct(cascade: Cascade, width: int, height: int) -> None:
    image = photo(width, height)
    latents = cascade.encode(image)
    assert latents.shape == (1, 16, *sizes.semantic_size(*sizes.native_size(height, width)))
    first, second = (cascade.reconstruct(image, seed=seed) for seed in (0, 1))
    assert first.size == second.size == (width, height)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == cascade.reconstruct(image, seed=0).tobytes()


def test_pictures_and_pixels() -> None:
    image = photo(9, 5)
    assert to_image(to_pixels(image)[0]).tobytes() == image.tobytes()
    assert to_pixels(image).shape == (1, 3, 5, 9)
    assert to_pixels(Image.new("L", (4, 4), 51)).unique().item() == pytest.approx(0.2)
    assert to_pixels(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).unique().item() == 1


@pytest.mark.parametrize(
    ("configured", "numerics", "expected"),
    [(0.3764, "official", 0.43), (0.3764, "diffusers", 0.3764), (0.5, "official", 0.5), (0.5, "diffusers", 0.5)],
)
def test_published_scale_of_stage_a_is_corrected_and_any_other_left(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch, configured: float, numerics: str, expected: float
) -> None:
    cascade = make_cascade(components, numerics=numerics)
    cascade.vqgan.register_to_config(scale_factor=configured)
    scales = []
    decode = cascade.vqgan.decode
    monkeypatch.setattr(cascade.vqgan, "decode", lambda latents, scale: scales.append(scale) or decode(latents, scale))
    cascade.generate(Request("a cat"))
    assert scales == [expected]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 63}, "width is 63; it must be a whole number from 64 to 2048."),
        ({"height": 2049}, "height is 2049; it must be a whole number from 64 to 2048."),
        ({"height": 512.0}, "height is 512.0; it must be a whole number from 64 to 2048."),
        ({"num_images": 0}, "num_images is 0; it must be a whole number of at least 1."),
        ({"num_images": True}, "num_images is True; it must be a whole number of at least 1."),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 9223372036854775807."),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be"),
        ({"steps_prior": 0}, "steps_prior is 0; it must be a whole number from 1 to 1000."),
        ({"steps_decoder": 1001}, "steps_decoder is 1001; it must be a whole number from 1 to 1000."),
        ({"guidance_scale_prior": -0.5}, "guidance_scale_prior is -0.5; it must be a number of at least 0."),
        ({"guidance_scale_decoder": float("nan")}, "guidance_scale_decoder is nan; it must be a number of at least 0."),
        ({"guidance_scale_decoder": float("inf")}, "guidance_scale_decoder is inf; it must be"),
        ({"guidance_scale_prior": "4"}, "guidance_scale_prior is '4'; it must be a number of at least 0."),
        ({"sampler": "euler"}, "sampler is 'euler'; it must be one of ddpm, ddim, lcm."),
        ({"prompt_strength": -0.1}, "prompt_strength is -0.1; it must be a number from 0 to 1."),
        ({"prompt_strength": 1.1}, "prompt_strength is 1.1; it must be a number from 0 to 1."),
        ({"prompt_strength": float("nan")}, "prompt_strength is nan; it must be a number from 0 to 1."),
        ({"image_prompts": (Image.new("L", (1, 1)),) * 5}, "image_prompts has 5 images; 4 are the limit."),
        ({"image_prompt_strengths": (1.0,)}, "image_prompt_strengths has 1 numbers; image_prompts has 0 images."),
        (
            {"image_prompts": (Image.new("L", (1, 1)),), "image_prompt_strengths": (-1.0,)},
            "image_prompt_strengths has -1.0 in it; it must have numbers of at least 0.",
        ),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, without escapes
        Request("a cat", **wrong)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("wrong", [{"prompt": None}, {"prompt": ["a cat"]}, {"prompt": "", "negative_prompt": None}])
def test_texts_must_be_texts(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"prompt is .*; it must be a text"):
        Request(**wrong)


@pytest.mark.parametrize("wrong", [{"image": "a.png"}, {"image_prompts": ("a.png",)}])
def test_images_must_be_images(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^image.* 'a\.png'.*; it must "):
        Request("a cat", **wrong)


def test_wrong_options_are_refused(components: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="numerics is 'comfy'; it must be one of official, notebook, diffusers"):
        make_cascade(components, numerics="comfy")
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        make_cascade(components, max_batch=0)


def test_where_even_one_picture_does_not_fit_it_is_made_without_graphs(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """After a failure, first without the graphs of other sizes; the next request of this size does not try again."""
    cascade = make_cascade(components)
    (expected,) = cascade.generate(Request("a cat", **SMALL))
    records: list[bool] = []

    def forward(*_: object) -> None:
        records.append(all(recorder.records for recorder in cascade._recorders))
        if records[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with cascade.decoder.register_forward_pre_hook(forward):
        (image,) = cascade.generate(Request("a cat", **SMALL))
        assert records == [True, True, False, False]
        assert np.array_equal(read(image), read(expected))
        lines = [record.getMessage() for record in caplog.records]
        assert [line.rpartition("without ")[2] for line in lines] == ["the graphs so far.", "graphs, more slowly."]
        cascade.generate(Request("a cat", **SMALL))
        assert records[4:] == [False, False]
        cascade.generate(Request("a cat", **{**SMALL, "width": 72}))
        assert records[6:] == [True, True, False, False]
