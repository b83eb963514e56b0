"""With `DiffusersCascade`, pictures are those of the two pipelines that diffusers has frozen, chained."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from cascade.compat.diffusers import DiffusersCascade
from cascade.images.tensors import to_image
from cascade.pipeline import Cascade
from cascade.request import Request
from tests.components import make_their_processor
from tests.diffusers_pipelines import make_pipelines
from tests.tiny import make_cascade

PROMPT, NEGATIVE = "a cat, 7 pizzas.", "fog"


@pytest.fixture(scope="module")
def ours(components: dict[str, Any]) -> Cascade:
    return make_cascade(components, DiffusersCascade)


@pytest.fixture(scope="module")
def theirs(components: dict[str, Any], ours: Cascade) -> tuple[Any, Any]:
    pipelines = make_pipelines(
        ours.prior, ours.decoder, ours.vqgan, components["tokenizer"], components["text_encoder"]
    )
    pipelines[0].register_modules(feature_extractor=make_their_processor(), image_encoder=components["image_encoder"])
    return pipelines


def photo(seed: int, width: int, height: int) -> Image.Image:
    noise = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return to_image(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("height", "width", "num_images", "guidance_prior", "guidance_decoder", "image_prompts"),
    [
        (128, 128, 1, 4.0, None, 0),
        (128, 256, 2, 4.0, 2.0, 0),
        (256, 128, 1, 1.0, 0.0, 0),
        (100, 120, 1, 3.0, 1.0, 0),
        (128, 128, 1, 4.0, None, 1),
        (128, 256, 2, 4.0, 2.0, 3),
        (256, 128, 1, 1.0, 0.0, 4),
    ],
)
def test_pictures_are_those_of_diffusers(
    ours: Cascade,
    theirs: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    num_images: int,
    guidance_prior: float,
    guidance_decoder: float | None,
    image_prompts: int,
) -> None:
    prior, decoder = theirs
    generators = [torch.Generator().manual_seed(5 + i) for i in range(num_images)]
    photos = tuple(photo(seed, 60 + seed, 40) for seed in range(image_prompts))
    semantic = prior(
        PROMPT,
        images=list(photos) or None,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=guidance_prior,
        num_images_per_prompt=num_images,
        generator=generators,
    ).image_embeddings
    options = {} if guidance_decoder is None else {"guidance_scale": guidance_decoder}
    expected = decoder(
        semantic,
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=3,
        generator=generators,
        output_type="pt",
        **options,
    ).images

    monkeypatch.setattr("cascade.pipeline.to_image", lambda pixels: pixels)  # without the rounding to 8 bits
    request = Request(
        PROMPT,
        NEGATIVE,
        width=width,
        height=height,
        num_images=num_images,
        seed=5,
        steps_prior=4,
        steps_decoder=3,
        guidance_scale_prior=guidance_prior,
        guidance_scale_decoder=guidance_decoder,
        image_prompts=photos,
    )
    actual = torch.stack(ours.generate(request))

    assert actual.shape == expected.shape
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.2
    assert (actual - expected).abs().max() <= 1e-4
    if photos:
        without = torch.stack(ours.generate(replace(request, image_prompts=())))
        assert (without - expected).abs().max() > 1e-3


def test_image_to_image_is_refused(ours: Cascade) -> None:
    with pytest.raises(ValueError, match="diffusers' numerics have no image-to-image"):
        ours.generate(Request(PROMPT, image=photo(0, 64, 64)))


def test_the_authors_numerics_differ(ours: Cascade, components: dict[str, Any]) -> None:
    request = Request(PROMPT, seed=5, width=128, height=128)
    official = make_cascade(components)
    (first,), (second,) = official.generate(request), ours.generate(request)
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()


def test_a_size_that_crashes_diffusers_is_refused_in_its_numerics_only(
    ours: Cascade, components: dict[str, Any]
) -> None:
    request = Request(PROMPT, width=208, height=64, steps_prior=1, steps_decoder=1)
    with pytest.raises(ValueError, match="2x5 semantic latents make 21x53 decoder latents; both sides must be even"):
        ours.generate(request)
    (image,) = make_cascade(components).generate(request)
    assert image.size == (208, 64)


def test_other_samplers_are_refused(ours: Cascade) -> None:
    with pytest.raises(ValueError, match="sampler is 'lcm'; diffusers' numerics have 'ddpm' only"):
        ours.generate(Request(PROMPT, sampler="lcm"))
