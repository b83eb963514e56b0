"""Draws the pictures of README.md and docs: the miniature's pictures, and what its stages predict after some steps.

It uses only the public functions of ``cascade``; prompts and seeds are constants of this file.
"""

import argparse
import io
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade import Lora, sizes
from cascade.guides.controls import Control, canny
from cascade.guides.inpainting import extend
from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.stages.tiles import Tiles
from miniature.sheets import SIDE, sheet
from miniature.stage_a import decode, encode_and_decode
from scripts.environment import ROOT

MINI = ROOT / "weights" / "mini"
# The same seed for all. The prompts are chosen to show every kind of prompt that the miniature knows.
SEED = 0
PROMPTS = (
    "a red apple on a green background",
    "an octopus in cartoon style on a turquoise background",
    "a rocket above a full moon on a dark blue background",
    "a large hamburger on a pink to purple gradient from left to right",
    "a flat style mushroom on a dark green background",
    "a glossy 3D mushroom on a dark green background",
    "an astronaut on a black background",
    "a lemon to the left of a watermelon on a blue background",
    "a motor scooter in cartoon style on a yellow background",
    "a parrot on a dark green background",
    "a small strawberry at the bottom right on a turquoise background",
    "a snowman in the center on a blue to white gradient",
    "a penguin under an umbrella on a light blue background",
    "a jack-o'-lantern on a black to purple gradient",
    "a bullet train on an orange background",
    "a butterfly above a sunflower on a light blue background",
    "a tropical fish on a dark blue to turquoise gradient",
    "a flat style robot on a beige background",
)
FOLLOWED = ("a parrot on a dark green background", "a butterfly above a sunflower on a light blue background")
STEPS_PRIOR, STEPS_DECODER = 20, 10
PRIOR_SHOWN, DECODER_SHOWN = (1, 5, 10, 20), (1, 3, 6, 10)
# Prompts and seeds of the evaluation on which guidance has a large effect, and one for which a negative prompt has.
GUIDED = (("a cat with a light blue background", 20200), ("an artist next to an angry face with horns", 20500))
GUIDANCES = (1, 4, 8)
CHOSEN_AGAINST, NEGATIVE = "a heart", ("", "red heart")
VARIED = (PROMPTS[0], "a motor scooter in cartoon style on a yellow background")
REPLACED = "a lemon on a green background"
STRENGTHS = (0.1, 0.2, 0.4, 0.8, 1.0)
# The mask over the butterfly; prompts for what replaces it, and for what is painted below it.
MASKED = (60, 0, 200, 120)
ABOVE = tuple(f"{thing} above a sunflower on a light blue background" for thing in ("a rocket", "a full moon"))
BELOW = "a butterfly above a tulip on a light blue background"
# Prompts of the pictures whose edges are used, with the prompts that use them.
EDGES = {
    PROMPTS[10]: ("a strawberry on a turquoise background", "a tomato on a yellow background"),
    PROMPTS[3]: ("a full moon on a black background",),
}
EDGES_SEED = 3
WEIGHTS_SEED = 5
STRIP = 2304  # pixels: the width of a picture in tiles, as high as the miniature's own
SEMANTIC_TILES = 4  # 16 channels are shown as 4 x 4

# References for the IP-Adapter, and prompts to use them with.
REFERENCES = ("a flat style fox on a yellow background", "a glossy 3D rocket on a light blue background")
BESIDE = ("a purple background", "a teapot")
# Prompts for the LoRAs, by their files' names.
ADAPTED = {
    "ink": ("an ink apple", "an ink dog on a yellow background", "a castle in ink style on a light blue background"),
    "pim": ("[pim]", "[pim] on a purple background", "a small [pim] at the bottom left on a gray background"),
}

COLUMNS = 6
# All pictures of the pages together stay below this; the highest WebP quality is taken with which they do.
BYTES = 495_000
QUALITIES = range(20, 81, 2)


def draw_examples(cascade: Cascade) -> Image.Image:
    """A picture of every prompt."""
    return sheet([cascade.generate(Request(prompt, seed=SEED))[0] for prompt in PROMPTS], COLUMNS, PROMPTS)


def draw_prior(cascade: Cascade) -> Image.Image:
    """Stage C's prediction after some of its steps, shown by the previewer; then the finished pictures."""
    pictures, captions = [], []
    for prompt in FOLLOWED:
        step = 0
        for progress in cascade.steps(Request(prompt, seed=SEED, steps_prior=STEPS_PRIOR)):
            step += progress.stage == "prior"
            if progress.stage == "prior" and step in PRIOR_SHOWN:
                pictures += cascade.preview(progress.latents)
                captions.append(f"step {step} of {STEPS_PRIOR}")
            if progress.image is not None:
                pictures.append(progress.image)
                captions.append("after Stages B and A")
    return sheet(pictures, len(PRIOR_SHOWN) + 1, captions)


def draw_decoder(cascade: Cascade) -> Image.Image:
    """Stage B's prediction after some of its steps, decoded by Stage A."""
    pictures, captions = [], []
    for prompt in FOLLOWED:
        request = Request(prompt, seed=SEED, steps_prior=STEPS_PRIOR, steps_decoder=STEPS_DECODER)
        step = 0
        for progress in cascade.steps(request):
            step += progress.stage == "decoder"
            if progress.stage == "decoder" and step in DECODER_SHOWN:
                pictures += decode(cascade, progress.latents)
                captions.append(f"step {step} of {STEPS_DECODER}")
    return sheet(pictures, len(DECODER_SHOWN), captions)


def draw_compression(cascade: Cascade) -> Image.Image:
    """Pictures, their reconstructions by Stage A, their semantic latents, and reconstructions by Stages B and A."""
    pictures, captions = [], []
    for prompt in FOLLOWED:
        (original,) = cascade.generate(Request(prompt, seed=SEED))
        pictures += [original, encode_and_decode(cascade, original), draw_channels(cascade.encode(original)[0])]
        captions += ["a picture", "Stage A, from 4×64×64", "16×6×6 semantic latents"]
        for seed in (1, 2):
            pictures.append(cascade.reconstruct(original, seed=seed, prompt=prompt))
            captions.append(f"Stages B and A, from those, seed {seed}")
    return sheet(pictures, 5, captions)


def draw_guidance(cascade: Cascade) -> Image.Image:
    """The same prompt and seed at several scales of Stage C's guidance; then seeds without and with a negative prompt."""
    pictures, captions = [], []
    for prompt, seed in GUIDED:
        for scale in GUIDANCES:
            pictures += cascade.generate(Request(prompt, seed=seed, guidance_scale_prior=scale))
            captions.append(f"guidance {scale}: {prompt}")
    for negative in NEGATIVE:
        pictures += cascade.generate(Request(CHOSEN_AGAINST, negative_prompt=negative, num_images=3, seed=SEED))
        captions += [f"{CHOSEN_AGAINST}, but not: {negative}" if negative else CHOSEN_AGAINST] * 3
    return sheet(pictures, COLUMNS, captions)


def draw_variation(cascade: Cascade) -> Image.Image:
    """Pictures, and their variations: the pictures as image prompts with an empty prompt."""
    pictures, captions = [], []
    for prompt in VARIED:
        (source,) = cascade.generate(Request(prompt, seed=SEED))
        pictures += [source, *cascade.generate(Request("", image_prompts=(source,), num_images=2, seed=1))]
        captions += ["an image", *["from its embedding"] * 2]
    return sheet(pictures, COLUMNS, captions)


def draw_image_to_image(cascade: Cascade) -> Image.Image:
    """A picture, and what a prompt makes of it at increasing strengths."""
    (source,) = cascade.generate(Request(PROMPTS[0], seed=SEED))
    pictures, captions = [source], ["an image"]
    for strength in STRENGTHS:
        # Without guidance: with it, the prompt dominates at every strength.
        request = Request(REPLACED, image=source, prompt_strength=strength, guidance_scale_prior=1, seed=SEED)
        pictures += cascade.generate(request)
        captions.append(f"strength {strength:g}")
    return sheet(pictures, COLUMNS, captions)


def draw_inpainting(cascade: Cascade) -> Image.Image:
    """A picture, a mask, and what prompts paint into it; halves of pictures, and what prompts paint below them."""
    parrot, pair = (cascade.generate(Request(prompt, seed=SEED))[0] for prompt in FOLLOWED)
    mask = Image.new("L", pair.size)
    mask.paste("white", MASKED)
    pictures, captions = [pair, mask], ["an image", "a mask"]
    for prompt in ABOVE:
        pictures += cascade.generate(Request(prompt, image=pair, mask=mask, num_images=2, seed=SEED))
        captions += [prompt] * 2
    side = parrot.width
    for image, prompt in ((parrot, FOLLOWED[0]), (pair, BELOW)):
        half = image.crop((0, 0, side, side // 2))
        canvas, new = extend(half, None, 0, 0, 0, side - side // 2)
        pictures.append(Image.composite(Image.new("RGB", canvas.size, "lightgrey"), canvas, new))
        pictures += cascade.generate(
            Request(prompt, image=canvas, mask=new, prompt_strength=1, num_images=2, seed=SEED)
        )
        captions += ["half an image", *[prompt] * 2]
    return sheet(pictures, COLUMNS, captions)


def draw_canny(cascade: Cascade) -> Image.Image:
    """Pictures, their edges, and pictures of other prompts without and with these edges."""
    pictures, captions = [], []
    for source, prompts in EDGES.items():
        (image,) = cascade.generate(Request(source, seed=SEED))
        pictures += [image, to_image(canny(to_pixels(image))[0].expand(3, -1, -1))]
        captions += ["an image", "its edges"]
        for prompt in prompts:
            for controls, how in (((), "without"), ((Control("canny", image),), "with edges")):
                pictures += cascade.generate(Request(prompt, seed=EDGES_SEED, controls=controls))
                captions.append(f"{how}: {prompt}")
    return sheet(pictures, COLUMNS, captions)


def draw_channels(latents: Tensor) -> Image.Image:
    """The channels of latents (16, h, w) side by side, scaled from black (smallest value) to white (largest)."""
    channels, height, width = latents.shape
    low, high = latents.min(), latents.max()
    rows = channels // SEMANTIC_TILES
    tiles = torch.ones(rows, SEMANTIC_TILES, height + 1, width + 1)
    tiles[..., :height, :width] = ((latents - low) / (high - low)).cpu().view(rows, SEMANTIC_TILES, height, width)
    page = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]
    return to_image(page.expand(3, -1, -1))


def draw_weights(cascade: Cascade) -> Image.Image:
    """Weight 0 for one of two objects, beside the prompt without it; and two colours with weights that add up to 2."""
    objects = (
        "a banjo next to a rhinoceros",
        "(a banjo:0) next to a rhinoceros",
        "a rhinoceros",
        "a banjo next to (a rhinoceros:0)",
    )
    colours = [f"(red:{weight:g}) (blue:{2 - weight:g})" for weight in (0.5, 1.0, 1.25, 1.5)]
    requests = [Request(f"{text} on a turquoise background", seed=WEIGHTS_SEED) for text in objects]
    requests += [Request(f"a cat on a {text} background", seed=WEIGHTS_SEED, weight_pooled=True) for text in colours]
    pictures = [cascade.generate(replace(request, prompt_weighting=True))[0] for request in requests]
    return sheet(pictures, len(objects), [*objects, *colours])


def draw_large(cascade: Cascade) -> Image.Image:
    """A picture of twice the miniature's size, as usual and at compression 64; and a place between tiles, which were made apart,
    and as Stage B makes them."""
    prompt = PROMPTS[0]
    large = [
        cascade.generate(Request(prompt, seed=SEED, width=512, height=512, compression=compression))[0]
        for compression in (sizes.SEMANTIC_PIXELS, sizes.SPARSEST)
    ]
    (picture,) = cascade.generate(Request(prompt, seed=SEED))
    tiles = Tiles(*sizes.decoder_size(SIDE, STRIP))
    width, second = (sizes.STAGE_A_FACTOR * side for side in (tiles.edges[1], tiles.places[1][1]))
    strip = Image.new("RGB", (STRIP, SIDE))
    for left in range((second - SIDE // 2) % SIDE - SIDE, STRIP, SIDE):  # so that one is across the border
        strip.paste(picture, (left, 0))
    apart = Image.new("RGB", strip.size)
    for left in (0, second):
        tile = strip.crop((left, 0, left + width, SIDE))
        apart.paste(cascade.reconstruct(tile, SEED + left, prompt), (left, 0))
    around = (second - SIDE // 2, 0, second + SIDE // 2, SIDE)
    shown = [one.crop(around) for one in (apart, cascade.reconstruct(strip, SEED, prompt))]
    captions = ["512x512", "512x512, compression 64", "pictures side by side", "tiles of one picture"]
    return sheet([*large, *shown], 4, captions)


def draw_ip_adapter(cascade: Cascade) -> Image.Image:
    """References; pictures of each as an image prompt, and by the IP-Adapter alone, with prompts, and for its style only."""
    pictures, captions = [], []
    for prompt in REFERENCES:
        (source,) = cascade.generate(Request(prompt, seed=SEED))
        used = {"ip_adapter_images": (source,), "seed": SEED}
        requests = {
            "as image prompt": Request("", image_prompts=(source,), seed=SEED),
            "IP-Adapter": Request("", **used),
            **{f"IP-Adapter: {text}": Request(text, **used) for text in BESIDE},
        }
        if cascade.ip_adapter.blocks_of("style"):
            requests[f"its style only: {BESIDE[-1]}"] = Request(BESIDE[-1], ip_adapter_mode="style", **used)
        pictures += [source, *(cascade.generate(request)[0] for request in requests.values())]
        captions += ["a reference", *requests]
    return sheet(pictures, len(pictures) // len(REFERENCES), captions)


def draw_loras(cascade: Cascade) -> Image.Image:
    """Pictures with the LoRAs in the miniature's folder."""
    prompts = [(name, text) for name, texts in ADAPTED.items() for text in texts]
    requests = [
        Request(text, loras=(Lora(MINI / "loras" / f"{name}.safetensors"),), seed=SEED) for name, text in prompts
    ]
    pictures = [cascade.generate(request)[0] for request in requests]
    return sheet(pictures, COLUMNS, [f"{name}: {text}" for name, text in prompts])


DRAWINGS: dict[str, Callable[[Cascade], Image.Image]] = {
    "mini.webp": draw_examples,
    "prior.webp": draw_prior,
    "decoder.webp": draw_decoder,
    "compression.webp": draw_compression,
    "guidance.webp": draw_guidance,
    "variation.webp": draw_variation,
    "image-to-image.webp": draw_image_to_image,
    "inpainting.webp": draw_inpainting,
    "canny.webp": draw_canny,
    "weights.webp": draw_weights,
    "large.webp": draw_large,
}


def drawings() -> dict[str, Callable[[Cascade], Image.Image]]:
    """What can be drawn with the miniature: more than `DRAWINGS` if it has an IP-Adapter or LoRAs."""
    more = {}
    if (MINI / "ip_adapter").is_dir():
        more["ip-adapter.webp"] = draw_ip_adapter
    if all((MINI / "loras" / f"{name}.safetensors").is_file() for name in ADAPTED):
        more["loras.webp"] = draw_loras
    return DRAWINGS | more


def as_webp(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=6)
    return file.getvalue()


def compressed(pictures: Mapping[str, Image.Image], most: int) -> dict[str, bytes]:
    """WebP files that together have at most ``most`` bytes, all of the highest quality with which they do, or of the lowest."""

    def files(quality: int) -> dict[str, bytes]:
        return {name: as_webp(picture, quality) for name, picture in pictures.items()}

    fitting = bisect_right(QUALITIES, most, key=lambda quality: sum(map(len, files(quality).values())))
    return files(QUALITIES[max(0, fitting - 1)])


def main(arguments: list[str] | None = None) -> int:
    """``scripts/make-method-pictures``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/make-method-pictures", description="Draw the pictures of README.md and docs."
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    # float32, so that a GPU draws the same pictures as a CPU.
    cascade = Cascade.load(MINI, dtype=torch.float32)
    pictures = {name: draw(cascade) for name, draw in drawings().items()}
    others = sum(file.stat().st_size for file in options.output.iterdir() if file.name not in pictures)
    for name, content in compressed(pictures, BYTES - others).items():
        (options.output / name).write_bytes(content)
        sys.stdout.write(f"{options.output / name}\n")
    return 0
