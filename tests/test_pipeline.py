"""The chain: requests, progress, randomness, sizes."""

import functools
import itertools
import json
import math
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

from cascade import pipeline, sizes
from cascade.compat.diffusers import DiffusersCascade
from cascade.guides.controls import Control
from cascade.images.tensors import to_image, to_pixels
from cascade.limits import InputError
from cascade.pipeline import Cascade
from cascade.progress import Progress
from cascade.request import Request
from cascade.sampling import Noise, diffuse
from cascade.weights import CONTROLNETS, WeightsError
from tests.tiny import count_calls, make_cascade

WITHOUT_CONTROLNET = ("previewer", "effnet", "image-encoder")
SMALL = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 2}
PIXELS = (Image.new("L", (1, 1)), Image.new("L", (1, 1), 255))


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
    assert cascade.image_prompts.encoder is not None
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
    for width, published in ((16, ()), (1536, WITHOUT_CONTROLNET), (2048, (*WITHOUT_CONTROLNET, "controlnet"))):
        cascade.planner = replace(cascade.planner, width=width)
        for what, part, options in (
            ("no previewer, which previews need", "previewer", None),
            ("no semantic encoder, which reads images", "effnet", {"image": photo(64, 64)}),
            ("no image encoder, which image prompts need", "image-encoder", {"image_prompts": (photo(64, 64),)}),
            ("no controlnet_canny, which", "controlnet", {"controls": (Control("canny", photo(64, 64)),)}),
        ):
            needs = cascade.planner.check_previewer
            if options is not None:
                needs = functools.partial(cascade.generate, Request("a cat", **options, **SMALL))
            with pytest.raises(ValueError, match=f"^This model has {what}.*; ") as caught:
                needs()
            advice = f"scripts/download-weights --only --with {part}, then scripts/save-weights, add it."
            if part not in published:
                advice = (
                    f"none was published for a Stage C of width {width}, but docs/training.md says how to train one."
                )
            assert str(caught.value).endswith(f"; {advice}")


def test_a_controlnet_that_cannot_be_trained_here(model_folder: Path, tmp_path: Path) -> None:
    """Training has no stage for super_resolution, so no document says how to train one."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    content = json.loads((folder / "model.json").read_text())
    name = "controlnet_super_resolution"
    shutil.rmtree(folder / name, ignore_errors=True)
    content["files"] = {path: value for path, value in content["files"].items() if not path.startswith(f"{name}/")}
    (folder / "model.json").write_text(json.dumps(content))
    cascade = Cascade.load(folder, device="cpu")
    with pytest.raises(ValueError, match=f"^This model has no {name}, which upscale and controls") as caught:
        cascade.generate(Request("", controls=(Control("super_resolution", photo(64, 64)),), width=128, height=128))
    assert str(caught.value).endswith("; none was published for a Stage C of width 16, and none can be trained here.")


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
    assert [one.stage for one in progress] == ["text", *batch, *["image"] * 4, *batch, "image"]
    assert [one.done for one in progress] == list(range(1, len(progress) + 1))
    assert {one.total for one in progress} == {len(progress)}
    for one in progress:
        assert (one.image is None) == (one.stage != "image")
        assert (one.latents is not None) == (one.stage in ("prior", "decoder"))
    assert [tuple(one.latents.shape) for one in progress[1:4]] == [(4, 16, 2, 2)] * 2 + [(4, 4, 16, 16)]


def test_every_input_image_is_a_piece_of_work(cascade: Cascade) -> None:
    image = photo(128, 128)
    request = Request(
        "a cat",
        image_prompts=(image, image),
        image=image,
        mask=Image.new("L", (128, 128), 255),
        controls=(Control("canny", image), Control("super_resolution", image)),
        steps_prior=1,
        steps_decoder=1,
    )
    progress = list(cascade.steps(request))
    # The image prompts, the image to begin with, two controls, and the one that the mask brings.
    assert [one.stage for one in progress] == ["text", *["input_images"] * 5, "prior", "decoder", "image"]
    assert [one.done for one in progress] == list(range(1, 10))
    assert {one.total for one in progress} == {9}


def test_nothing_is_computed_for_what_cannot_be_made(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = make_cascade({name: part for name, part in components.items() if name not in CONTROLNETS})
    texts = count_calls(cascade.text.encoder, monkeypatch)
    images = count_calls(cascade.effnet, monkeypatch)
    with pytest.raises(ValueError, match="no controlnet_canny"):
        cascade.generate(Request("a cat", image=photo(64, 64), controls=(Control("canny", photo(64, 64)),)))
    assert texts == images == []


def test_whoever_iterates_may_stop(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_calls(cascade.prior, monkeypatch)
    steps = cascade.steps(Request("a cat", **{**SMALL, "steps_prior": 9}))
    for _ in itertools.islice(steps, 3):
        pass
    steps.close()
    assert len(forwards) == 2

    def cancel(progress: Progress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cascade.generate(Request("a cat", **{**SMALL, "steps_prior": 9}), cancel)
    assert len(forwards) == 5


def test_text_is_encoded_once(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(cascade.text.encoder, monkeypatch)
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
    prompts = count_calls(cascade.image_prompts.encoder, monkeypatch)
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
    assert {one.total for one in progress} == {1 + 1 + steps + 2 + 1}


def test_strength_0_is_a_reconstruction(cascade: Cascade) -> None:
    request = Request("a cat", image=photo(128, 64), width=128, height=64, prompt_strength=0.0, seed=3)
    (image,) = cascade.generate(request)
    assert image.tobytes() == cascade.reconstruct(photo(128, 64), seed=3, prompt="a cat").tobytes()


def test_the_notebook_noises_at_shift_1_what_it_samples_at_2(components: dict[str, Any]) -> None:
    """Image-to-image only; and there, what Stage C begins with is all that differs."""
    starts, pictures = {}, {}
    for numerics, shift in (("official", None), ("notebook", 1.0)):
        cascade, seen = make_cascade(components, start_shift=shift), []
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
    ("configured", "said", "make", "expected"),
    [
        (0.3764, 0.43, Cascade, 0.43),
        (0.3764, 0.43, DiffusersCascade, 0.3764),
        (0.3764, None, Cascade, 0.3764),
        (0.5, None, Cascade, 0.5),
        (0.5, None, DiffusersCascade, 0.5),
    ],
)
def test_scale_of_stage_a(
    components: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    configured: float,
    said: float | None,
    make: type[Cascade],
    expected: float,
) -> None:
    """The model folder's, which corrects the published configuration; one of one's own may be what that has, too."""
    cascade = make_cascade(components, make, stage_a_scale=said)
    cascade.vqgan.register_to_config(scale_factor=configured)
    scales = []
    decode = cascade.vqgan.decode

    def watched(latents: torch.Tensor, scale: float | None) -> torch.Tensor:
        scales.append(cascade.vqgan.config.scale_factor if scale is None else scale)
        return decode(latents, scale)

    monkeypatch.setattr(cascade.vqgan, "decode", watched)
    cascade.generate(Request("a cat"))
    assert scales == [expected]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 63}, "width is 63; it must be a whole number from 64 to 4096."),
        ({"height": 4097}, "height is 4097; it must be a whole number from 64 to 4096."),
        ({"height": 512.5}, "height is 512.5; it must be a whole number from 64 to 4096."),
        ({"num_images": 0}, "num_images is 0; it must be a whole number of at least 1."),
        ({"num_images": True}, "num_images is True; it must be a whole number of at least 1."),
        ({"seed": -1}, "seed is -1; it must be a whole number from 0 to 9223372036854775807."),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be"),
        ({"steps_prior": 0}, "steps_prior is 0; it must be a whole number from 1 to 1000."),
        ({"steps_decoder": 1001}, "steps_decoder is 1001; it must be a whole number from 1 to 1000."),
        ({"guidance_scale_prior": -0.5}, "guidance_scale_prior is -0.5; it must be a number from 0 to 20."),
        ({"guidance_scale_decoder": float("nan")}, "guidance_scale_decoder is nan; it must be a number from 0 to 20."),
        ({"guidance_scale_decoder": float("inf")}, "guidance_scale_decoder is inf; it must be"),
        ({"guidance_scale_prior": "4"}, "guidance_scale_prior is '4'; it must be a number from 0 to 20."),
        (
            {"sampler": "euler"},
            "sampler is 'euler'; it must be one of default, ddpm, ddim, ddim_cosine, lcm.",
        ),
        ({"prompt_strength": -0.1}, "prompt_strength is -0.1; it must be a number from 0 to 1."),
        ({"prompt_strength": 1.1}, "prompt_strength is 1.1; it must be a number from 0 to 1."),
        ({"prompt_strength": float("nan")}, "prompt_strength is nan; it must be a number from 0 to 1."),
        ({"image_prompts": (Image.new("L", (1, 1)),) * 5}, "image_prompts has 5 images; it may have at most 4."),
        ({"image_prompt_strengths": (1.0,)}, "image_prompt_strengths needs image_prompts, which is left out."),
        (
            {"image_prompts": PIXELS, "image_prompt_strengths": [1]},
            "image_prompt_strengths has 1 value; it must have 2, one for each of image_prompts.",
        ),
        (
            {"image_prompts": PIXELS, "image_prompt_strengths": (1, -1.0)},
            "image_prompt_strengths[1] is -1.0; it must be a number from 0 to 2.",
        ),
        (
            {"image_prompt_strengths": 7},
            "image_prompt_strengths is 7; it must be a list of up to 4 numbers from 0 to 2.",
        ),
        ({"guidance_scale_prior": True}, "guidance_scale_prior is True; it must be a number from 0 to 20."),
        ({"image_prompts": PIXELS[0]}, "image_prompts is an image of 1x1 pixels; it must be a list of up to 4 images."),
        (
            {"image_prompts": [PIXELS[0], "a.png"]},
            "image_prompts[1] is 'a.png'; it must be an image (PIL.Image.Image).",
        ),
        (
            {"image": np.zeros((400, 400, 3))},
            "image is an array of the shape (400, 400, 3); it must be an image (PIL.Image.Image).",
        ),
        ({"image": "a.png"}, "image is 'a.png'; it must be an image (PIL.Image.Image)."),
        ({"mask": "beta"}, "mask is 'beta'; it must be an image (PIL.Image.Image) or 'alpha'."),
        ({"mask": "alpha"}, "mask needs image, which is left out."),
        ({"prompt": 5}, "prompt is 5; it must be a text."),
        ({"negative_prompt": ["a"]}, "negative_prompt is ['a']; it must be a text."),
        ({"prompt": "a \ud83d"}, "prompt has '\\ud83d' at place 2; it must be a text of whole characters."),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Request(**{"prompt": "a cat", **wrong})
    assert str(caught.value).startswith(message)


def test_a_request_has_its_values_in_one_kind() -> None:
    """Whatever the caller had: they are compared, and written into files."""
    request = Request(
        "a cat",
        width=np.int64(64),
        height=72.0,
        seed=np.uint8(3),
        guidance_scale_prior=np.float32(4),
        prompt_strength=1,
        image_prompts=list(PIXELS),
        image_prompt_strengths=[np.float64(0.5), 1],
    )
    same = Request("a cat", "", 64, 72, 1, 3, None, None, 4.0, image_prompts=PIXELS, image_prompt_strengths=(0.5, 1.0))
    assert request == replace(same, prompt_strength=1.0)
    kinds = {name: type(value) for name, value in vars(request).items()}
    assert (kinds["width"], kinds["height"], kinds["seed"]) == (int, int, int)
    assert (kinds["guidance_scale_prior"], kinds["prompt_strength"]) == (float, float)
    assert {type(strength) for strength in request.image_prompt_strengths} == {float}
    assert kinds["image_prompts"] is kinds["controls"] is tuple


def test_python_may_ask_for_more_than_one_server_gives_everybody() -> None:
    assert Request("a cat", num_images=1000, steps_prior=1000, seed=2**63 - 1, sampler="lcm").num_images == 1000


@pytest.mark.parametrize("wrong", ["a cat", None, {"prompt": "a cat"}])
def test_what_is_no_request(components: dict[str, Any], wrong: Any) -> None:
    with pytest.raises(InputError, match=r"^request is .*; it must be a Request, such as Request\('a cat'\)\.$"):
        make_cascade(components).generate(wrong)


def test_wrong_options_are_refused(components: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        make_cascade(components, max_batch=0)


# ---- memory that does not suffice, numbers that are none ----

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]


def everything(**options: Any) -> Request:
    """A request in which every network runs."""
    image = photo(128, 128)
    small = {"width": 128, "height": 128, "steps_prior": 1, "steps_decoder": 1}
    controls = (Control("canny", image), Control("super_resolution", image))
    return Request(
        "a cat", image=image, image_prompts=(image,), controls=controls, num_images=2, **{**small, **options}
    )


@pytest.fixture(scope="module")
def expected(components: dict[str, Any]) -> list[Image.Image]:
    """What becomes of that request."""
    return make_cascade(components).generate(everything())


@pytest.mark.parametrize(
    ("part", "error"),
    zip(("text_encoder", "image_encoder", "effnet", "controlnet_canny", "prior", "vqgan"), 2 * ERRORS, strict=True),
)
def test_whatever_memory_does_not_suffice_for_is_tried_again(
    components: dict[str, Any],
    expected: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    error: Exception,
) -> None:
    cascade = make_cascade(components)
    networks = {
        "text_encoder": cascade.text.encoder,
        "image_encoder": cascade.image_prompts.encoder,
        "controlnet_canny": cascade.controlnets["canny"],
    }
    network = networks.get(part) or getattr(cascade, part)
    method = "decode" if part == "vqgan" else "forward"
    works, failures = getattr(network, method), []

    def failing(*args: Any, **options: Any) -> Any:
        if not failures:
            failures.append(1)
            raise error
        return works(*args, **options)

    monkeypatch.setattr(network, method, failing)
    progress = list(cascade.steps(everything()))
    assert failures
    assert progress[-1].done == progress[-1].total == len(progress)
    made = [one.image for one in progress if one.image is not None]
    for one, other in zip(made, expected, strict=True):
        assert np.abs(read(one) - read(other)).max() <= 1


def test_memory_that_never_suffices_is_an_error(components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = make_cascade(components)

    def fail(*_: object, **__: object) -> None:
        raise ERRORS[1]

    monkeypatch.setattr(cascade.effnet, "forward", fail)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        cascade.generate(everything())
    monkeypatch.undo()
    assert len(cascade.generate(everything())) == 2


def test_fewer_at_a_time_where_memory_does_not_suffice(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For later requests of this size, too; until more memory is free than when that was found out."""
    cascade = make_cascade(components)
    free = [2**30]
    monkeypatch.setattr("cascade.running.runner.usable", lambda _: free[0])
    room = [1]
    batches: list[int] = []

    def forward(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        batches.append(inputs[0].shape[0])
        if batches[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    unguided = {"guidance_scale_prior": 1.0, "guidance_scale_decoder": 1.0, "num_images": 4, **SMALL}
    with cascade.decoder.register_forward_pre_hook(forward):
        cascade.generate(Request("a cat", **unguided))
        assert batches == [4, 2, *[1] * 8]
        assert [record.getMessage() for record in caplog.records] == [
            "Out of memory with 4 pictures at a time of 64x64: going on with 2 at a time.",
            "Out of memory with 2 pictures at a time of 64x64: going on with 1 at a time.",
        ]
        batches.clear()
        cascade.generate(Request("a cat", **unguided))
        assert batches == [1] * 8
        cascade.generate(Request("a cat", **{**unguided, "width": 72}))
        assert batches[8:10] == [4, 2]
        batches.clear()
        free[0], room[0] = 2**31, 4
        cascade.generate(Request("a cat", **unguided))
        assert batches == [4, 4]


def test_where_not_even_one_picture_fits_graphs_are_given_up(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """For all networks of later requests of this size, the encoders too; not for those of another size."""
    cascade = make_cascade(components)
    (expected,) = cascade.generate(Request("a cat", **SMALL))
    recorded: list[bool] = []

    def records() -> bool:
        return cascade.runner.graphs.captures

    def forward(*_: object) -> None:
        recorded.append(records())
        if records():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with cascade.decoder.register_forward_pre_hook(forward):
        (image,) = cascade.generate(Request("a cat", **SMALL))
        assert recorded == [True, False, False]
        assert np.array_equal(read(image), read(expected))
        assert [record.getMessage() for record in caplog.records] == [
            "Out of memory with 1 picture at a time of 64x64: going on without CUDA graphs, which is slower."
        ]
    seen: list[bool] = []
    with cascade.text.encoder.register_forward_pre_hook(lambda *_: seen.append(records())):
        cascade.generate(Request("a cat", **SMALL))
        cascade.generate(Request("a cat", **{**SMALL, "width": 72}))
        cascade.generate(Request("a cat", **SMALL))
    assert seen == [False, True, False]
    assert records(), "outside of requests"


@pytest.mark.parametrize(("stage", "letter"), [("prior", "C"), ("decoder", "B")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite_end_the_work(
    components: dict[str, Any], stage: str, letter: str, value: float
) -> None:
    cascade = make_cascade(components)
    with torch.no_grad():
        getattr(cascade, stage).clf[1].bias[0] = value
    with pytest.raises(RuntimeError, match="not finite") as caught:
        cascade.generate(Request("a cat", **SMALL))
    assert str(caught.value) == (
        f"Stage {letter} made latents that are not finite, in float32: its weights are damaged, or need another dtype "
        "(CASCADE_DTYPE), such as float32; or a LoRA's scale or values are too large."
    )
    if stage == "decoder":
        with pytest.raises(RuntimeError, match="Stage B made latents that are not finite"):
            cascade.reconstruct(photo(64, 64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", ["up_blocks.0.0", "out_block.0"])
@pytest.mark.parametrize("edge", [None, 5], ids=["whole", "tiles"])
def test_pixels_that_are_not_finite_end_the_work(
    components: dict[str, Any], edge: int | None, layer: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also infinite ones, which clamping would make white or black."""
    cascade = make_cascade(components)
    if edge is not None:
        monkeypatch.setattr(pipeline, "tile_within", lambda *_: edge)
    with torch.no_grad():
        cascade.vqgan.get_submodule(layer).bias[0] = value
    with pytest.raises(RuntimeError, match=r"^Stage A made pixels that are not finite, in float32: ."):
        cascade.generate(Request("a cat", **SMALL))
