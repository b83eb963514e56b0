"""What the IP-Adapter costs at the published size, on this GPU: ``python -m scripts.benchmark_ip_adapter``.

Networks have random weights, on which time and memory do not depend. Pictures with a reference and without are made in turn, so
that what else changes with time falls on both. Then the adapter is trained for some steps. Prints JSON, a line a measurement.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from functools import partial
from typing import Any

import torch
from PIL import Image

from cascade import kernels
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.images.preprocessing import ClipPreprocessor
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.sizes import semantic_size
from cascade.stages.text import TextEncoder
from cascade.weights import PUBLISHED_SAMPLER, ModelFolder
from scripts.contenders import PROMPT
from scripts.environment import ROOT
from scripts.stand_ins import make_network, randomize
from scripts.timing import in_turn, percent_more
from training.tasks.ip_adapter import predict

CUDA = torch.device("cuda")
ADAPTERS = {"every fourth block": tuple(range(0, 64, 4)), "every block": tuple(range(64))}
SIDES = (512, 1024)
BATCH = 8
WARM_UP = 3
NETWORKS = ("text_encoder", "image_encoder", "prior", "decoder", "vqgan")


def make_networks() -> dict[str, Any]:
    """Text encoder, image encoder, Stages A, B and C on the GPU."""
    networks = {name: make_network(name, CUDA) for name in NETWORKS}
    for name in ("prior", "decoder", "vqgan"):
        networks[name].use_kernels(kernels.choose(CUDA, torch.bfloat16).name)
    return networks


def make_cascade(networks: dict[str, Any], blocks: tuple[int, ...]) -> Cascade:
    """A model with an adapter for these blocks."""
    tokenizer = ModelFolder.open(ROOT / "weights" / "mini").load_component("tokenizer")
    with torch.device(CUDA):
        adapter = randomize(IPAdapter(blocks=blocks)).eval()
    side = networks["image_encoder"].config.image_size
    processor = ClipPreprocessor(size=side, crop=(side, side))
    return Cascade(
        TextEncoder(tokenizer, networks["text_encoder"]),
        networks["prior"],
        networks["decoder"],
        networks["vqgan"],
        ImagePromptEncoder(processor, networks["image_encoder"]),
        ip_adapter=adapter,
        defaults=PUBLISHED_SAMPLER,
        native_size=1024,
    )


def time_pictures(cascade: Cascade, runs: int, references: int) -> dict[str, list[float]]:
    """Seconds a picture of 1024x1024 in each run, without references and with; made in turn."""
    noise = Image.effect_noise((1024, 1024), 64).convert("RGB")
    plain = {"width": 1024, "height": 1024, "guidance_scale_decoder": 1.0}
    requests = {
        "without": Request(PROMPT, **plain),
        "native image prompt": Request(PROMPT, image_prompts=(noise,) * references, **plain),
        "with": Request(PROMPT, ip_adapter_images=(noise,) * references, **plain),
    }
    return in_turn({name: partial(cascade.generate, request) for name, request in requests.items()}, runs, WARM_UP)


def compare(name: str, seconds: dict[str, list[float]], references: int) -> dict[str, Any]:
    """Medians, and how much longer a picture takes with references: the median over runs, and its quartiles, in percent."""
    return {
        "adapter": name,
        "references": references,
        "runs": len(seconds["with"]),
        "seconds": {way: round(statistics.median(each), 4) for way, each in seconds.items()},
        "percent more": [round(one, 2) for one in percent_more(seconds["with"], seconds["without"])],
    }


def time_training(prior: StableCascadeUNet, blocks: tuple[int, ...], side: int, steps: int) -> dict[str, Any]:
    """Steps a second and peak GiB of training at this picture size: float32 weights, bfloat16 products, as the stage has it."""
    torch.cuda.empty_cache()
    with torch.device(CUDA):
        adapter = IPAdapter(blocks=blocks)
        adapter.copy_keys(prior)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator(CUDA).manual_seed(0)
    latents = BATCH, 16, *semantic_size(side, side)
    shapes = {"noisy": latents, "text": (BATCH, 77, 1280), "pooled": (BATCH, 1, 1280), "features": (BATCH, 257, 1024)}
    batch = {name: torch.randn(shape, generator=generator, device=CUDA) for name, shape in shapes.items()}
    batch["timesteps"] = torch.rand(BATCH, generator=generator, device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = predict(prior, adapter, **batch).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return {
        "training": f"{len(blocks)} blocks",
        "pixels": side,
        "batch": BATCH,
        "trained parameters": sum(one.numel() for one in adapter.parameters()),
        "steps a second": round(steps / (time.perf_counter() - start), 3),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def say(measured: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(measured) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="timed pictures of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps (default: %(default)s)")
    options = parser.parse_args()
    say({"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    networks = make_networks()
    for name, blocks in ADAPTERS.items():
        cascade = make_cascade(networks, blocks)
        for references in (1, 2):
            say(compare(name, time_pictures(cascade, options.runs, references), references))
        del cascade
    prior = networks.pop("prior").requires_grad_(False).float()
    prior.use_kernels("plain")
    networks.clear()
    for blocks, side in itertools.product(ADAPTERS.values(), SIDES):
        try:
            say(time_training(prior, blocks, side, options.steps))
        except torch.OutOfMemoryError as error:
            say({"training": f"{len(blocks)} blocks", "pixels": side, "error": str(error).partition(". ")[0]})


if __name__ == "__main__":
    main()
