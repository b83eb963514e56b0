"""What a user of the package may write. mypy and pyright check it, in their strict modes, and it is never run."""

from collections.abc import Iterator
from typing import assert_type

from PIL import Image
from torch import Tensor

from cascade import Cascade, Control, Lora, Progress, Request, __version__
from cascade.guides.inpainting import extend
from cascade.request import upscaling


def report(progress: Progress) -> None:
    assert_type(progress.latents, Tensor | None)
    print(f"{progress.stage}: {progress.done} of {progress.total}")


def pictures(cascade: Cascade, photo: Image.Image) -> Iterator[Image.Image]:
    control = Control("canny", photo, scale=0.5)
    request = Request("an apple", num_images=2, seed=7, guidance_scale_prior=3, image=photo, controls=[control])
    yield from cascade.generate(request, on_progress=report)
    canvas, mask = extend(photo, None, 0, 0, 128, 0)
    yield from cascade.generate(Request("an apple", image=canvas, mask=mask))
    yield from cascade.generate(upscaling(photo, "an apple"))
    yield from cascade.generate(Request("an apple", loras=[Lora("style.safetensors", scale=0.5), Lora(path="more")]))
    for made in cascade.batch([Request("an apple", seed=7), Request("a pear", seed=8)]):
        yield from made
    for progress in cascade.steps(Request("an apple", image_prompts=[photo], image_prompt_strengths=[0.5])):
        report(progress)
        if progress.stage == "prior" and progress.latents is not None:
            yield from cascade.preview(progress.latents)
        if progress.image is not None:
            yield progress.image
    yield cascade.reconstruct(photo)


def main() -> None:
    cascade = Cascade.load("weights/mini", device="cpu", memory="resident")
    assert_type(cascade, Cascade)
    assert_type(cascade.encode(Image.new("RGB", (64, 64))), Tensor)
    for number, picture in enumerate(pictures(cascade, Image.open("apple.png"))):
        picture.save(f"apple-{number}-{__version__}.png")
