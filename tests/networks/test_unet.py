"""StableCascadeUNet: published configurations, diffusers' class as a reference, and features that diffusers' class lacks."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet as Reference

from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet, timestep_embedding
from cascade.weights.variants import VARIANTS
from tests.components import copied

RES, TIME, ATTN = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
STAGE_C = {
    "conditioning_dim": 32,
    "block_out_channels": (32, 48),
    "num_attention_heads": (4, 4),
    "down_num_layers_per_block": (1, 2),
    "up_num_layers_per_block": (2, 1),
    "clip_text_in_channels": 20,
    "clip_text_pooled_in_channels": 24,
    "clip_image_in_channels": 12,
    "switch_level": (False,),
}
STAGE_B = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 32,
    "clip_text_pooled_in_channels": 24,
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "timestep_conditioning_type": ("sca",),
    "dropout": (0.0, 0.0, 0.1),
    "block_types_per_layer": ((RES, TIME), (RES, TIME, ATTN), (RES, TIME, ATTN)),
    "block_out_channels": (16, 32, 32),
    "num_attention_heads": (0, 4, 4),
    "down_num_layers_per_block": (1, 2, 1),
    "up_num_layers_per_block": (2, 1, 2),
    "down_blocks_repeat_mappers": (1, 1, 2),
    "up_blocks_repeat_mappers": (3, 2, 1),
}


def make(config: dict, std: float = 0.15) -> StableCascadeUNet:
    """A network in evaluation mode, with random weights so that all of them have an effect."""
    network = copied(made(tuple(config.items()), std))
    torch.manual_seed(2)  # whether it was made before or not
    return network


@cache
def made(config: tuple[tuple[str, Any], ...], std: float) -> StableCascadeUNet:
    torch.manual_seed(0)
    network = StableCascadeUNet(**dict(config)).eval()
    for tensor in network.state_dict().values():  # views: in the order and the shapes of the published tensors
        torch.nn.init.normal_(tensor, std=std)
    return network


def inputs(config: dict, batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    conditions = {"clip_text_pooled": torch.randn(batch, 1, 24)}
    if "effnet_in_channels" in config:
        return conditions | {"effnet": torch.randn(batch, 16, 3, 2), "pixels": torch.randn(batch, 3, 8, 8)}
    return conditions | {"clip_text": torch.randn(batch, 7, 20), "clip_img": torch.randn(batch, 3, 12)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("prior", 3_589_103_632),
        ("prior_lite", 1_030_785_040),
        ("decoder", 1_562_941_136),
        ("decoder_lite", 699_471_248),
    ],
)
def test_published_configurations(name, parameters):
    config = next(variant.config for variant in VARIANTS if variant.name == name)
    with torch.device("meta"):
        ours, reference = StableCascadeUNet(**config), Reference(**config)
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in (ours, reference)]
    assert shapes[0] == shapes[1]
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert set(ours.config) == set(reference.config) - {"_use_default_values"}


@pytest.mark.parametrize(
    ("config", "channels", "size"),
    [
        pytest.param(STAGE_C, 16, (5, 7), id="C"),
        pytest.param(STAGE_C | {"switch_level": (True,)}, 16, (7, 5), id="C, resized levels, odd"),
        pytest.param(STAGE_C | {"switch_level": None}, 16, (7, 9), id="C, strided levels, odd"),
        pytest.param(STAGE_C | {"self_attn": False}, 16, (4, 4), id="C, no self-attention"),
        pytest.param(STAGE_B, 4, (8, 8), id="B"),
        pytest.param(STAGE_B, 4, (22, 18), id="B, odd levels"),
    ],
)
@torch.no_grad()
def test_same_as_diffusers(config, channels, size):
    network = make(config)
    reference = Reference(**config).eval()
    reference.load_state_dict(network.state_dict())
    sample, ratio, conditions = torch.randn(2, channels, *size), torch.tensor([0.3, 0.9]), inputs(config)
    expected = reference(sample, ratio, **conditions).sample
    torch.testing.assert_close(network(sample, ratio, **conditions), expected, atol=1e-5, rtol=0)
    cached = network.condition(**conditions, latent_size=size)
    torch.testing.assert_close(network(sample, ratio, cached), expected, atol=1e-5, rtol=0)
    conditions.pop("pixels", None)
    expected = reference(sample, ratio, **conditions).sample
    torch.testing.assert_close(network(sample, ratio, **conditions), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sca_and_crp_have_their_own_embedding():
    network, sample, ratio = make(STAGE_C), torch.randn(2, 16, 4, 4), torch.rand(2)
    conditions = network.condition(**inputs(STAGE_C))
    plain = network(sample, ratio, conditions)
    zeros, half = torch.zeros(2), torch.full((2,), 0.5)
    assert torch.equal(network(sample, ratio, conditions, sca=zeros, crp=zeros), plain)
    by_sca, by_crp = network(sample, ratio, conditions, sca=half), network(sample, ratio, conditions, crp=half)
    assert not torch.allclose(by_sca, plain)
    assert not torch.allclose(by_sca, by_crp)


@torch.no_grad()
def test_absent_image_is_a_zero_embedding():
    network, sample, ratio = make(STAGE_C), torch.randn(2, 16, 4, 4), torch.rand(2)
    given = inputs(STAGE_C) | {"clip_img": torch.zeros(2, 1, 12)}
    without = {name: value for name, value in given.items() if name != "clip_img"}
    assert torch.equal(network(sample, ratio, **without), network(sample, ratio, **given))


@torch.no_grad()
def test_texts_of_unlike_lengths_in_one_batch():
    """Padding has no effect, and ln k counts a text k times, as repeating its tokens does."""
    network = make(STAGE_C)
    sample, ratio, given = torch.randn(2, 16, 5, 4), torch.tensor([0.3, 0.9]), inputs(STAGE_C)
    text = given.pop("clip_text")
    with torch.no_grad():
        alone = network(sample, ratio, **given, clip_text=text[:, :3])
        twice = network(sample, ratio, **given, clip_text=text[:, :3].repeat(1, 2, 1))

        def predicted(
            text: torch.Tensor, lengths: list[int] | None = None, bias: list[list[float]] | None = None
        ) -> torch.Tensor:
            conditions = network.condition(
                **given,
                clip_text=text,
                clip_text_lengths=None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
                clip_text_bias=None if bias is None else torch.tensor(bias),
            )
            return network(sample, ratio, conditions)

        log2 = math.log(2)
        whole = network(sample, ratio, **given, clip_text=text)
        torch.testing.assert_close(predicted(text, [3, 3]), alone)
        torch.testing.assert_close(predicted(text, [3, 7]), torch.cat([alone[:1], whole[1:]]))
        torch.testing.assert_close(predicted(text[:, :3], bias=[[log2] * 3] * 2), twice)
        mixed = predicted(text, [3, 3], [[log2] * 3 + [9] * 4, [0] * 7])
        torch.testing.assert_close(mixed, torch.cat([twice[:1], alone[1:]]))
        torch.testing.assert_close(predicted(text[:, :3], bias=[[0] * 3] * 2), alone)
    assert (twice - alone).abs().max() > 1e-3
    assert (whole - alone).abs().max() > 1e-3


def test_a_text_with_padding_lets_gradients_pass():
    network = make(STAGE_C)
    network.enable_gradient_checkpointing()
    given = inputs(STAGE_C)
    text = given["clip_text"].requires_grad_()
    lengths = torch.full((2,), 5, dtype=torch.int32)
    conditions = network.condition(**given, clip_text_bias=torch.zeros(2, 7), clip_text_lengths=lengths)
    network(torch.randn(2, 16, 3, 3), torch.rand(2), conditions).square().sum().backward()
    assert text.grad[:, :5].abs().sum(dim=2).min() > 0
    assert not text.grad[:, 5:].any()


def test_controlnet_residual_goes_before_its_resblock():
    """ResBlocks are numbered in execution order, and repeated levels count again."""
    network, sample, ratio = make(STAGE_B), torch.randn(1, 4, 16, 16), torch.rand(1)
    conditions = network.condition(**inputs(STAGE_B, 1), latent_size=(16, 16))
    seen: list[torch.Tensor] = []
    for block in network.blocks():
        if isinstance(block, ResBlock):
            block.register_forward_pre_hook(lambda _, args: seen.append(args[0].settle().permute(0, 3, 1, 2)))
    network(sample, ratio, conditions)
    plain, runs = list(seen), len(seen)
    assert runs == 1 + 2 + 2 * 1 + 3 * 2 + 2 * 1 + 1 * 2
    for k in (0, 4, 9, runs - 1):
        seen.clear()
        residual = torch.full((1, plain[k].shape[1], 3, 3), 0.5)
        network(sample, ratio, conditions, controlnet_residuals={k: residual})
        assert all(torch.equal(a, b) for a, b in zip(seen[:k], plain[:k], strict=True))
        torch.testing.assert_close(seen[k], plain[k] + 0.5)


def test_timestep_embedding_is_float32():
    ratio = torch.tensor([0.9497, 0.0])
    embedded = timestep_embedding(ratio, 64)
    frequencies = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 31)
    angles = (ratio.double() * 10000)[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(embedded.double(), expected, atol=2e-3, rtol=0)
    assert embedded.dtype == torch.float32
    assert timestep_embedding(ratio, 7).shape == (2, 7)


@pytest.mark.parametrize(("config", "channels"), [(STAGE_C, 16), (STAGE_B, 4)], ids=["C", "B"])
@torch.no_grad()
def test_bfloat16_weights_keep_the_float32_timestep(config, channels):
    """Latents stay float32, and two timesteps that are equal in bfloat16 give different results."""
    network = make(config)
    half = copied(network).to(torch.bfloat16)
    sample, conditions = torch.randn(2, channels, 8, 8), inputs(config)
    ratio = torch.tensor([0.9497, 0.9497])
    out = half(sample, ratio, **conditions)
    assert out.dtype == torch.float32
    exact = network(sample, ratio, **conditions)
    assert (out - exact).norm() / exact.norm() < 0.1
    assert not torch.equal(half(sample, ratio + 1e-4, **conditions), out)


@pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids=["C", "B"])
@torch.no_grad()
def test_bfloat16_weights_keep_the_residual_stream_in_float32(config):
    """Unlike diffusers' network, which loses precision over many layers. At time 0, whose embedding is exact in bfloat16."""
    layers = tuple(4 * count for count in config["down_num_layers_per_block"])
    config = config | {"down_num_layers_per_block": layers, "up_num_layers_per_block": layers[::-1]}
    exact = make(config, std=0.1).to(torch.bfloat16).float()
    half = copied(exact).to(torch.bfloat16)
    reference = Reference(**config).to(torch.bfloat16).eval()
    reference.load_state_dict(half.state_dict())

    streams = set()
    for block in half.blocks():
        block.register_forward_hook(lambda _, args, out: streams.update((args[0].x.dtype, out.settle().dtype)))
    branches = set()
    for module in half.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out: branches.update((args[0].dtype, out.dtype)))

    channels = config.get("in_channels", 16)
    given = {name: x.bfloat16() for name, x in inputs(config).items()}
    sample, ratio = torch.randn(2, channels, 16, 16).bfloat16(), torch.zeros(2)
    expected = exact(sample.float(), ratio, **{name: x.float() for name, x in given.items()})
    ours = half(sample.float(), ratio, **given) - expected
    theirs = reference(sample, ratio.bfloat16(), **given).sample - expected
    assert streams == {torch.float32}
    assert branches == {torch.bfloat16}
    assert 1.5 * ours.norm() <= theirs.norm()


def test_mixed_precision_training():
    network, sample, ratio = make(STAGE_B).train(), torch.randn(2, 4, 8, 8), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(sample, ratio, **inputs(STAGE_B))
    assert out.dtype == torch.float32
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_gradients_reach_conditions_and_survive_checkpointing():
    network, sample, ratio = make(STAGE_B).train(), torch.randn(2, 4, 8, 8), torch.rand(2)
    given = inputs(STAGE_B)
    given["effnet"].requires_grad_()
    given["clip_text_pooled"].requires_grad_()
    wanted = [*network.parameters(), given["effnet"], given["clip_text_pooled"]]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)  # dropout's random numbers
        return torch.autograd.grad(network(sample, ratio, **given).square().mean(), wanted)

    plain = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    network.enable_gradient_checkpointing()
    for gradient, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("config", "channels"), [(STAGE_C, 16), (STAGE_B, 4)], ids=["C", "B"])
def test_late_conditions_change_only_where_keys_are_computed(config, channels):
    """In the blocks' own forward, also when activations are recomputed."""
    network, sample, ratio = make(config), torch.randn(2, channels, 8, 8), torch.rand(2)
    given, found = inputs(config), []
    for late, recomputed in ((False, False), (True, False), (True, True)):
        network.late_conditions = late
        if recomputed:
            network.enable_gradient_checkpointing()
        made = network(sample, ratio, **given)
        found.append([made, *torch.autograd.grad(made.square().mean(), list(network.parameters()))])
    for values in found[1:]:
        for value, expected in zip(values, found[0], strict=True):
            torch.testing.assert_close(value, expected)


def test_dropout_only_in_training():
    network, sample, ratio = make(STAGE_C), torch.randn(1, 16, 4, 4), torch.rand(1)
    with torch.no_grad():
        conditions = network.condition(**inputs(STAGE_C, 1))
        assert torch.equal(network(sample, ratio, conditions), network(sample, ratio, conditions))
        network.train()
        assert not torch.equal(network(sample, ratio, conditions), network(sample, ratio, conditions))


@pytest.mark.slow
@pytest.mark.parametrize(("config", "channels"), [(STAGE_C, 16), (STAGE_B, 4)], ids=["C", "B"])
@torch.no_grad()
def test_one_graph_for_the_compiler(config, channels):
    network, sample, ratio = make(config), torch.randn(1, channels, 10, 8), torch.rand(1)
    conditions = network.condition(**inputs(config, 1), latent_size=(10, 8))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sample, ratio, conditions), network(sample, ratio, conditions))
    torch.compiler.reset()


def test_initialisation():
    network = StableCascadeUNet(**STAGE_B)
    sample, ratio = torch.randn(1, 4, 8, 8), torch.rand(1)
    assert network(sample, ratio, **inputs(STAGE_B, 1)).abs().max() == 0
    for block in network.blocks():
        if isinstance(block, ResBlock):
            last = block.channelwise[-1].weight
            bound = (6 / sum(last.shape)) ** 0.5 / 2  # there are four down ResBlocks
            assert 0.9 * bound < last.abs().max() <= bound
            assert not block.channelwise[2].gamma.any()
        elif isinstance(block, AttnBlock):
            bound = (6 / (4 * block.attention.channels)) ** 0.5
            assert 0.9 * bound < block.attention.to_qkv.weight.abs().max() <= bound
    for scale, shift in network.timestep_mappers(torch.rand(2, 1, 64), torch.float32):
        assert not scale.any()
        assert not shift.any()
    assert network.clip_txt_pooled_mapper.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_saved_and_loaded(tmp_path):
    network = make(STAGE_B)
    network.save_pretrained(tmp_path)
    loaded = StableCascadeUNet.from_pretrained(tmp_path)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert Reference.from_pretrained(tmp_path).config.block_out_channels == [16, 32, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": (4,)}, "num_attention_heads has 1 values"),
        ({"timestep_conditioning_type": ("sca", "zoom")}, "'zoom'"),
        ({"block_types_per_layer": ((RES,), ("UNetBlock",))}, "'UNetBlock'"),
        ({"pixel_mapper_in_channels": 3}, "effnet_in_channels"),
    ],
)
def test_wrong_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        StableCascadeUNet(**(STAGE_C | change))


def test_wrong_inputs():
    prior, decoder, ratio = make(STAGE_C), make(STAGE_B), torch.rand(1)
    pooled = torch.randn(1, 1, 24)
    with pytest.raises(ValueError, match="give clip_text"):
        prior.condition(pooled)
    with pytest.raises(ValueError, match="effnet and latent_size"):
        decoder.condition(pooled)
    with pytest.raises(ValueError, match="multiples of 2"):
        decoder(torch.randn(1, 4, 7, 8), ratio, **inputs(STAGE_B, 1))
    with pytest.raises(ValueError, match="clip_text_pooled"):
        prior(torch.randn(1, 16, 4, 4), ratio)
