"""What a long prompt costs at the published size, on this GPU: ``python -m scripts.benchmark_prompts``.

Networks have random weights, on which time does not depend. Pictures with prompts of 1 to 4 chunks of 75 tokens are made in
turn. Prints JSON, a line a measurement.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from typing import Any

import torch

from cascade import kernels
from cascade.limits import MOST_CHUNKS
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.stages.text import TextEncoder
from cascade.weights import PUBLISHED_SAMPLER, ModelFolder
from scripts.contenders import PROMPT
from scripts.environment import ROOT
from scripts.stand_ins import NEEDED, make_network
from scripts.timing import in_turn, percent_more


def make_cascade(device: torch.device) -> Cascade:
    """A model of the published size without images, in bfloat16."""
    networks = {name: make_network(name, device) for name in NEEDED}
    for name in ("prior", "decoder", "vqgan"):
        networks[name].use_kernels(kernels.choose(device, torch.bfloat16).name)
    tokenizer = ModelFolder.open(ROOT / "weights" / "mini").load_component("tokenizer")
    text = TextEncoder(tokenizer, networks.pop("text_encoder"))
    return Cascade(text, **networks, defaults=PUBLISHED_SAMPLER, native_size=1024)


def prompts(text: TextEncoder) -> dict[int, str]:
    """A prompt for each number of chunks, by the number."""
    found: dict[int, str] = {}
    prompt = PROMPT
    while len(found) < MOST_CHUNKS:
        found.setdefault(len(text.read(prompt)), prompt)
        prompt += f", {PROMPT}"
    return found


def measure(cascade: Cascade, runs: int, **options: Any) -> list[dict[str, Any]]:
    """Medians of the seconds that a picture takes, and how much more that is than with one chunk: quartiles, in percent.

    options: of the requests, besides the prompt.
    """
    requests = {str(number): Request(prompt, **options) for number, prompt in prompts(cascade.text).items()}
    seconds = in_turn({name: partial(cascade.generate, request) for name, request in requests.items()}, runs)
    return [
        {
            "chunks": int(name),
            "runs": runs,
            "seconds": round(statistics.median(each), 4),
            "percent more": [round(one, 2) for one in percent_more(each, seconds["1"])],
        }
        for name, each in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="timed pictures of each kind (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure")
    sys.stdout.write(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}) + "\n")
    cascade = make_cascade(torch.device("cuda"))
    for one in measure(cascade, options.runs, width=1024, height=1024, guidance_scale_decoder=1.0):
        sys.stdout.write(json.dumps(one) + "\n")


if __name__ == "__main__":
    main()
