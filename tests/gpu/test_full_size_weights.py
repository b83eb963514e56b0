"""The published networks at their full size, with random values: saved like a download, loaded onto the GPU, used."""

from pathlib import Path

import numpy as np
import torch

from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights import ModelFolder
from cascade.weights.build import save_model
from cascade.weights.published import PARTS
from tests.hub.repositories import write_download

# Parameters of the authors' networks: Stability-AI/StableCascade modules/, and of the two CLIP encoders.
PARAMETERS = {
    "prior": 3_589_103_632,
    "decoder": 1_562_941_136,
    "vqgan": 18_406_894,
    "effnet": 20_177_488 + 1280 * 16,
    "previewer": 3_979_651,
    "text_encoder": 694_659_840,
    "image_encoder": 303_966_208,
}
# Bytes of files as they were published: names, shapes and dtypes must all be right for these.
PUBLISHED_SIZES = {"decoder": 3_126_071_088, "vqgan": 36_825_828, "text_encoder": 1_389_382_688}


def test_from_a_download_of_full_size_to_a_picture(tmp_path: Path) -> None:
    """Takes 26 GB of disk, half of it without hard links, and 13 GB of GPU memory."""
    download, target = tmp_path / "download", tmp_path / "model"
    parts = ["tokenizer", "feature_extractor", *PARAMETERS]
    write_download(download, parts, device="cuda")
    for name, size in PUBLISHED_SIZES.items():
        assert (download / PARTS[name].paths[-1]).stat().st_size == size

    save_model(download, target)
    ModelFolder.open(target).verify()

    cascade = Cascade.load(target, "cuda", torch.bfloat16)
    networks = {
        **{name: getattr(cascade, name) for name in ("prior", "decoder", "vqgan", "effnet", "previewer")},
        "text_encoder": cascade.text.encoder,
        "image_encoder": cascade.image_prompts.encoder,
    }
    counts = {name: sum(one.numel() for one in network.parameters()) for name, network in networks.items()}
    assert counts == PARAMETERS
    for name, network in networks.items():
        assert {(one.device.type, one.dtype) for one in network.parameters()} == {("cuda", torch.bfloat16)}, name

    steps = []
    request = Request("An astronaut on a horse", width=1024, height=1024, steps_prior=2, steps_decoder=1)
    (image,) = cascade.generate(request, steps.append)
    latents = [step.latents for step in steps if step.latents is not None]
    assert [tuple(one.shape) for one in latents] == [(1, 16, 24, 24), (1, 16, 24, 24), (1, 4, 256, 256)]
    assert all(one.isfinite().all() for one in latents)
    assert image.size == (1024, 1024)
    assert np.asarray(image).std() > 1
