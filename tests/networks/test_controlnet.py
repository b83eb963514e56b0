"""ControlNets: the authors' outputs, published sizes, each backbone, and the residuals' effect on Stage C."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.kernels.stream import Stream
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.unet import ResBlock
from cascade.weights import making, single_file, variants
from tests import fixture_data
from tests.networks.test_encoders import SMALL
from tests.networks.test_reference import TOLERANCE
from tests.networks.test_unet import STAGE_C, inputs, make

PUBLISHED = {
    "canny": ControlNet,
    "inpainting": lambda: ControlNet(in_channels=4),
    "super_resolution": lambda: ControlNet(in_channels=16, bottleneck_mode="large"),
}


def randomized(network: ControlNet) -> ControlNet:
    """A ControlNet in evaluation mode, with random projections instead of zeros."""
    torch.manual_seed(0)
    for projection in network.projections:
        torch.nn.init.normal_(projection[-1].weight)
    return network.eval()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "super_resolution")) for kind in PUBLISHED]
)
@torch.no_grad()
def test_against_the_authors(kind):
    name = f"controlnet_{kind}"
    theirs, data = fixture_data.description(name)["config"], fixture_data.tensors(name)
    weights = single_file.convert(fixture_data.weights(name))
    config = variants.controlnet_config({key: value.shape for key, value in weights.items()}, theirs["proj_blocks"])
    assert config["bottleneck_mode"] == theirs["bottleneck_mode"]
    residuals = making.build(weights, ControlNet, config)(data["image"])
    assert list(residuals) == theirs["proj_blocks"]
    for k, residual in residuals.items():
        torch.testing.assert_close(residual, data[f"out_{k}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "parameters", "size"),
    [
        ("canny", 54_255_776, 217_739_268),
        ("inpainting", 54_256_424, 217_741_855),
        ("super_resolution", 203_491_584, 813_989_376),
    ],
)
def test_published_sizes(kind, parameters, size):
    """The published files hold the network's tensors, and 14 to 21 kB of metadata."""
    with torch.device("meta"):
        network = PUBLISHED[kind]()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert 14_000 < size - file_size(network) < 21_000


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"in_channels": 3}, 217_720_288),
        ({"in_channels": 512, "proj_blocks": tuple(range(64)), "bottleneck_mode": "simple"}, 411_065_336),
    ],
    ids=["super-resolution, first version", "identity"],
)
def test_sizes_of_files_without_metadata(config, size):
    """Earlier uploads without metadata: exact to the byte."""
    with torch.device("meta"):
        assert file_size(ControlNet(**config)) == size


def file_size(network: ControlNet) -> int:
    """Bytes of a network's float32 safetensors file without metadata: length, header padded to 8 bytes, tensors."""
    header, end = {}, 0
    for key, tensor in sorted(network.state_dict().items(), key=lambda item: (-item[1].element_size(), item[0])):
        dtype = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + end


@torch.no_grad()
def test_effnet_backbone_of_three_channels_is_the_semantic_encoders():
    network, pixels = ControlNet(3, 8, (0,), effnet=SMALL).eval(), torch.rand(2, 3, 64, 33)
    encoder = SemanticEncoder(**SMALL).eval()
    encoder.backbone.load_state_dict(network.backbone.state_dict())
    torch.testing.assert_close(network.backbone(pixels), encoder.backbone(pixels))


@torch.no_grad()
def test_stem_of_other_channels_is_not_padded():
    stem = ControlNet(4, 8, (0,), effnet=SMALL).backbone[0][0]
    control = torch.rand(1, 4, 17, 12)
    torch.testing.assert_close(stem(control), F.conv2d(control, stem.weight, stride=2))
    assert stem(control).shape == (1, 8, 8, 5)


@torch.no_grad()
def test_simple_backbone():
    network = randomized(ControlNet(3, 5, (2, 0), bottleneck_mode="simple"))
    control, (first, _, second) = torch.randn(2, 3, 6, 4), network.backbone
    hidden = F.leaky_relu(F.conv2d(control, first.weight, first.bias, padding=1), 0.2)
    features = F.conv2d(hidden, second.weight, second.bias, padding=1)
    residuals = network(control)
    assert list(residuals) == [2, 0]
    for residual, (narrow, _, wide) in zip(residuals.values(), network.projections, strict=True):
        expected = F.conv2d(F.leaky_relu(F.conv2d(features, narrow.weight), 0.2), wide.weight)
        torch.testing.assert_close(residual, expected)
        assert residual.shape == (2, 5, 6, 4)


def test_untrained_changes_nothing_and_can_learn():
    network = ControlNet(2, 5, (0, 3), bottleneck_mode="simple")
    residuals = network(torch.rand(1, 2, 6, 4))
    assert all(not residual.any() for residual in residuals.values())
    sum(residual.sum() for residual in residuals.values()).backward()
    assert all(projection[-1].weight.grad.abs().sum() > 0 for projection in network.projections)


@pytest.mark.parametrize("options", [{"bottleneck_mode": "simple"}, {"effnet": SMALL}], ids=["simple", "effnet"])
@torch.no_grad()
def test_saved_and_loaded(options, tmp_path):
    network, control = randomized(ControlNet(4, 8, (1, 5), **options)), torch.rand(1, 4, 64, 64)
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["proj_blocks"] == [1, 5]
    loaded = ControlNet.from_pretrained(tmp_path)(control)
    for k, residual in network(control).items():
        assert torch.equal(loaded[k], residual)


@torch.no_grad()
def test_residuals_are_what_hooks_would_add():
    """With hooks: each residual, resized, is added to the input of its ResBlock in Stage C."""
    stage_c = make(STAGE_C)
    controlnet = randomized(ControlNet(4, STAGE_C["block_out_channels"][0], (0, 5), effnet=SMALL))
    residuals = {k: residual / residual.std() for k, residual in controlnet(torch.rand(2, 4, 128, 96)).items()}
    sample, ratio = torch.randn(2, 16, 6, 5), torch.tensor([0.9, 0.2])
    conditions = stage_c.condition(**inputs(STAGE_C))
    plain = stage_c(sample, ratio, conditions)
    given = stage_c(sample, ratio, conditions, controlnet_residuals=residuals)

    def adder(residual: Tensor):
        resized = F.interpolate(residual, size=(6, 5), mode="bilinear", align_corners=True)
        return lambda _, args: (Stream(args[0].settle() + resized.permute(0, 2, 3, 1)), *args[1:])

    blocks = [block for block in stage_c.blocks() if isinstance(block, ResBlock)]
    for k, residual in residuals.items():
        blocks[k].register_forward_pre_hook(adder(residual))
    hooked = stage_c(sample, ratio, conditions)
    torch.testing.assert_close(given, hooked)
    assert (given - plain).abs().mean() > 0.01


def test_bad_settings():
    with pytest.raises(ValueError, match="bottleneck_mode is 'vit'; allowed: 'effnet', 'simple', 'large'"):
        ControlNet(bottleneck_mode="vit")
    with pytest.raises(ValueError, match=r"proj_blocks is \(0, 4, 0\); a ResBlock can be named only once"):
        ControlNet(proj_blocks=(0, 4, 0))
