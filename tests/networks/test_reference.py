"""Every network against outputs of the authors' code, loaded from files in the authors' names."""

import pytest
import torch

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.weights import making, single_file
from tests import fixture_data

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def unet(name: str) -> StableCascadeUNet:
    return fixture_data.unet(name, fixture_data.description(name)["config"], fixture_data.weights(name))


def test_stage_c():
    network, data = unet("stage_c"), fixture_data.tensors("stage_c")
    conditions = network.condition(data["clip_text_pooled"], data["clip_text"], data["clip_img"])
    close(network(data["x"], data["r"], conditions), data["out"])
    residuals = {k: data[f"cnet_{k}"] for k in (0, 3, 7)}
    close(network(data["x"], data["r"], conditions, controlnet_residuals=residuals), data["out_cnet"])


def test_stage_b():
    network, data = unet("stage_b"), fixture_data.tensors("stage_b")
    inputs = {"clip_text_pooled": data["clip"], "effnet": data["effnet"]}
    close(network(data["x"], data["r"], **inputs), data["out"])
    close(network(data["x"], data["r"], **inputs, pixels=data["pixels"]), data["out_pixels"])


def test_stage_a():
    config, data = fixture_data.description("stage_a")["config"], fixture_data.tensors("stage_a")
    codebook = torch.zeros(config["codebook_size"], config["c_latent"])
    weights = single_file.convert({**fixture_data.weights("stage_a"), "vquantizer.codebook.weight": codebook})
    network = making.build(
        weights,
        StageA,
        {
            "levels": config["levels"],
            "bottleneck_blocks": config["bottleneck_blocks"],
            "embed_dim": config["c_hidden"],
            "latent_channels": config["c_latent"],
            "num_vq_embeddings": config["codebook_size"],
            "scale_factor": config["scale_factor"],
        },
    )
    close(network.encode(data["image"]), data["out_encode"])
    close(network.decode(data["latent"]), data["out_decode"])
    close(network.decode(data["latent"] / 2, scale=2 * config["scale_factor"]), data["out_decode"])


def test_effnet():
    network = making.build(single_file.convert(fixture_data.weights("effnet")), SemanticEncoder, {})
    assert isinstance(network, SemanticEncoder)
    data = fixture_data.tensors("effnet")
    preprocess = fixture_data.description("effnet")["preprocess"]
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    close(network(data["image_normalized"] * std + mean), data["out"])


def test_previewer():
    network = making.build(single_file.convert(fixture_data.weights("previewer")), Previewer, {})
    assert isinstance(network, Previewer)
    data = fixture_data.tensors("previewer")
    close(network(data["latent"]), data["out"])
