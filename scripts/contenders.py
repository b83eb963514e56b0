"""The contenders of the benchmark. Each runs in its own process: ``python -m scripts.contenders NAME ...``.

A contender loads the stand-ins, makes the pictures of some cases, and prints its measurements as JSON.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cascade.guides.controls import Control
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.speeds import SPEEDS

PROMPT = "a lighthouse on a cliff above the sea, in the evening"
STEPS_PRIOR, STEPS_DECODER, GUIDANCE = 20, 10, 4.0

# A function that makes the pictures of a case.
Make = Callable[[dict[str, Any]], Any]


def ours(folder: Path, lite: bool, memory: str, precision: str = "full") -> Make:
    stages = ("prior", "decoder") if lite else ()
    cascade = Cascade.load(folder, "cuda", torch.bfloat16, lite=stages, memory=memory, precision=precision)

    noise = Image.effect_noise((1024, 1024), 64).convert("RGB")
    inputs = {
        None: {},
        "control": {"controls": (Control("canny", noise),)},
        "start": {"image": noise, "prompt_strength": 0.5},
    }

    def make(case: dict[str, Any]) -> Any:
        return cascade.generate(
            Request(
                PROMPT,
                **inputs[case["image"]],
                width=case["size"],
                height=case["size"],
                compression=case["compression"],
                num_images=case["batch"],
                speed=case["speed"],
                **dict(zip(("steps_prior", "steps_decoder"), steps_of(case["speed"]), strict=True)),
                guidance_scale_prior=GUIDANCE,
                guidance_scale_decoder=case["decoder_guidance"],
            )
        )

    return make


def steps_of(speed: str) -> tuple[int, int]:
    """Of Stages C and B."""
    settings = SPEEDS[speed]
    return settings.prior.get("steps", STEPS_PRIOR), settings.decoder.get("steps", STEPS_DECODER)


def diffusers(folder: Path, lite: bool, offload: bool = False, compile_mode: str | None = None) -> Make:
    from diffusers import (
        DDPMWuerstchenScheduler,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizerFast

    ending = "_lite" if lite else ""
    there, here = folder / "stable-cascade-prior", folder / "stable-cascade"
    half = {"torch_dtype": torch.bfloat16}
    text = {
        "tokenizer": CLIPTokenizerFast.from_pretrained(there / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(there / "text_encoder", dtype=torch.bfloat16),
    }
    prior = StableCascadePriorPipeline(
        prior=StableCascadeUNet.from_pretrained(there / f"prior{ending}", **half),
        scheduler=DDPMWuerstchenScheduler(),
        **text,
    )
    decoder = StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(here / f"decoder{ending}", **half),
        vqgan=PaellaVQModel.from_pretrained(here / "vqgan", **half),
        scheduler=DDPMWuerstchenScheduler(),
        **text,
    )
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
        if offload:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to("cuda")
    if compile_mode:
        prior.prior = torch.compile(prior.prior, mode=compile_mode, fullgraph=True)
        decoder.decoder = torch.compile(decoder.decoder, mode=compile_mode, fullgraph=True)

    def make(case: dict[str, Any]) -> Any:
        size = {"height": case["size"], "width": case["size"]}
        made = prior(
            PROMPT,
            **size,
            num_images_per_prompt=case["batch"],
            num_inference_steps=STEPS_PRIOR,
            guidance_scale=GUIDANCE,
        )
        # Makes one picture for each embedding.
        return decoder(
            made.image_embeddings.to(torch.bfloat16),
            PROMPT,
            num_inference_steps=STEPS_DECODER,
            guidance_scale=case["decoder_guidance"],
        ).images

    return make


CONTENDERS: dict[str, Callable[[Path, bool], Make]] = {
    "diffusers": diffusers,
    "diffusers, model offload": lambda folder, lite: diffusers(folder, lite, offload=True),
    "diffusers, torch.compile": lambda folder, lite: diffusers(folder, lite, compile_mode="default"),
    "diffusers, reduce-overhead": lambda folder, lite: diffusers(folder, lite, compile_mode="reduce-overhead"),
    "ours": lambda folder, lite: ours(folder, lite, "resident"),
    "ours, int8": lambda folder, lite: ours(folder, lite, "resident", "int8"),
    "ours, fp8": lambda folder, lite: ours(folder, lite, "resident", "fp8"),
    "ours, offload": lambda folder, lite: ours(folder, lite, "offload"),
    "ours, stream": lambda folder, lite: ours(folder, lite, "stream"),
}


def measure(make: Make, case: dict[str, Any], runs: int) -> dict[str, Any]:
    """Seconds of the first run of a case and of the timed runs; peak GiB in tensors and reserved by torch."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        make(case)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "case": case["name"],
        "first": seconds[0],
        "seconds": seconds[2:],  # the second is a warm-up too
        "per_image": statistics.median(seconds[2:]) / case["batch"],
        "allocated": torch.cuda.max_memory_allocated() / 2**30,
        "reserved": torch.cuda.max_memory_reserved() / 2**30,
    }


def main() -> None:
    name, folder, cases, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
    start = float(sys.argv[5])  # when this process was started, from `time.time`
    warnings.simplefilter("ignore")
    results = []
    for lite in (False, True):
        of_kind = [case for case in cases if case["lite"] == lite]
        if not of_kind:
            continue
        make = CONTENDERS[name](folder, lite)
        torch.cuda.synchronize()
        ready = time.time() - start
        for case in of_kind:
            try:
                results.append({"contender": name, "ready": ready, **measure(make, case, runs)})
            except torch.OutOfMemoryError:
                results.append({"contender": name, "ready": ready, "case": case["name"], "error": "out of memory"})
            print(json.dumps(results[-1]), flush=True)
        del make
        torch.cuda.empty_cache()
        start = time.time()


if __name__ == "__main__":
    main()
