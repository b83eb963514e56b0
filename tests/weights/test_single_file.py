"""Single-file checkpoints: names, prefixes and recognition."""

import pytest
import torch

from cascade.networks.controlnet import ControlNet
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.weights import making, single_file, variants
from tests import fixture_data


def test_attention_projections_are_split_in_order():
    fused = torch.arange(36.0).view(12, 3)
    converted = single_file.convert({"up_blocks.0.2.attention.attn.in_proj_weight": fused})
    stem = "up_blocks.0.2.attention."
    assert list(converted) == [f"{stem}to_q.weight", f"{stem}to_k.weight", f"{stem}to_v.weight"]
    assert torch.equal(torch.cat(list(converted.values())), fused)
    save = [tensor.untyped_storage().data_ptr() for tensor in converted.values()]
    assert len(set(save)) == 3, "parts share memory and cannot be saved as safetensors"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("down_blocks.0.2.attention.attn.out_proj.bias", "down_blocks.0.2.attention.to_out.0.bias"),
        ("down_blocks.0.2.attention.attn.to_q.bias", "down_blocks.0.2.attention.to_q.bias"),
        ("clip_mapper.weight", "clip_txt_pooled_mapper.weight"),
        ("vquantizer.codebook.weight", "vquantizer.embedding.weight"),
        ("clip_txt_pooled_mapper.weight", "clip_txt_pooled_mapper.weight"),
        ("down_blocks.0.2.attention.to_out.0.bias", "down_blocks.0.2.attention.to_out.0.bias"),
    ],
)
def test_renamed(theirs, ours):
    assert list(single_file.convert({theirs: torch.zeros(3)})) == [ours]


@pytest.mark.parametrize("name", [variant.name for variant in variants.VARIANTS])
def test_published_variants_are_told_apart(name):
    variant = next(variant for variant in variants.VARIANTS if variant.name == name)
    state_dict = making.make(variant.network, variant.config).state_dict()
    assert variants.variant_of(state_dict) is variant
    assert list(single_file.split(state_dict)) == [variant.component]


def test_combined_file():
    """The layout of the ComfyUI checkpoint of Stage C: network, encoder, previewer and both CLIP towers in one file."""
    prior, effnet, previewer = (fixture_data.weights(name) for name in ("stage_c", "effnet", "previewer"))
    combined = {f"model.diffusion_model.{key}": tensor for key, tensor in prior.items()}
    combined |= {f"vae.encoder.{key}": tensor for key, tensor in effnet.items()}
    combined |= {f"vae.previewer.{key}": tensor for key, tensor in previewer.items()}
    text = torch.randn(4, 6)
    combined["text_encoder.clip_g.transformer.text_model.final_layer_norm.weight"] = torch.ones(4)
    combined["text_encoder.clip_g.text_projection"] = text
    combined["text_encoder.clip_g.logit_scale"] = torch.ones(())
    combined["clip_l_vision.vision_model.post_layernorm.weight"] = torch.ones(4)
    components = single_file.split(combined)
    assert set(components) == {"prior", "effnet", "previewer", "text_encoder", "image_encoder"}
    for name, weights in (("prior", prior), ("effnet", effnet), ("previewer", previewer)):
        expected = single_file.convert(weights)
        assert expected.keys() == components[name].keys()
        assert all(torch.equal(tensor, components[name][key]) for key, tensor in expected.items())
    assert set(components["text_encoder"]) == {"text_model.final_layer_norm.weight", "text_projection.weight"}
    assert torch.equal(components["text_encoder"]["text_projection.weight"], text.T)
    assert isinstance(making.build(components["previewer"], Previewer, {}), Previewer)


def test_combined_file_of_stage_b():
    weights = {f"model.diffusion_model.{key}": tensor for key, tensor in fixture_data.weights("stage_b").items()}
    weights |= {f"vae.{key}": tensor for key, tensor in fixture_data.weights("stage_a").items()}
    assert set(single_file.split(weights)) == {"decoder", "vqgan"}


def test_built_network_is_around_the_given_tensors():
    source = StageA(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=4).to(torch.bfloat16)
    state_dict = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    built = making.build(state_dict, StageA, {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 4})
    assert not built.training
    assert built.dtype == torch.bfloat16
    assert built.out_block[0].weight.data_ptr() == state_dict["out_block.0.weight"].data_ptr()
    assert all(tensor.device.type == "cpu" for tensor in built.state_dict().values())


def test_unpublished_width():
    with pytest.raises(ValueError, match=r"it is Stage C \(prior\) of width 64; published widths are 2048 or 1536\."):
        variants.variant_of(single_file.convert(fixture_data.weights("stage_c")))

    with pytest.raises(ValueError, match=r"it has no tensor down_blocks\.1\.0\.depthwise\.weight, which Stage B"):
        variants.variant_of({"effnet_mapper.0.weight": torch.zeros(1)})


def test_tensors_that_do_not_fit():
    weights = single_file.convert(fixture_data.weights("previewer"))
    del weights["blocks.0.bias"]
    with pytest.raises(ValueError, match=r"it does not fit Previewer: has no tensor blocks\.0\.bias\."):
        making.build(weights, Previewer, {})


@pytest.mark.parametrize(
    ("in_channels", "mode"), [(1, "effnet"), (3, "effnet"), (4, "effnet"), (16, "large"), (512, "simple")]
)
def test_controlnets_are_told_apart(in_channels, mode):
    with torch.device("meta"):
        network = ControlNet(in_channels=in_channels, out_channels=1536, bottleneck_mode=mode)
    state_dict = network.state_dict()
    assert list(single_file.split(state_dict)) == ["controlnet"]
    config = variants.controlnet_config({key: tensor.shape for key, tensor in state_dict.items()})
    assert config == {
        key: network.config[key] for key in ("in_channels", "out_channels", "proj_blocks", "bottleneck_mode")
    }


def test_controlnet_of_a_file():
    source = ControlNet(in_channels=2, out_channels=6, bottleneck_mode="simple")
    weights = single_file.split({f"control.{key}": tensor for key, tensor in source.state_dict().items()})["controlnet"]
    config = variants.controlnet_config({key: tensor.shape for key, tensor in weights.items()})
    built = making.build(weights, ControlNet, config)
    assert isinstance(built, ControlNet)
    assert not built.training
    assert all(torch.equal(tensor, built.state_dict()[key]) for key, tensor in source.state_dict().items())

    del weights["projections.7.0.weight"]
    with pytest.raises(ValueError, match=r"it does not fit ControlNet: has no tensor projections\.7\.0\.weight\."):
        making.build(weights, ControlNet, config)
    with pytest.raises(ValueError, match="controlnet has no variants that its width tells apart"):
        variants.variant_of(weights)


def test_controlnet_that_says_too_little():
    network = ControlNet(in_channels=2, out_channels=6, proj_blocks=tuple(range(64)), bottleneck_mode="simple")
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"has 64 projections, for ResBlocks \(0, 4, 8, 12, 51, 55, 59, 63\)"):
        variants.controlnet_config(shapes)
    assert variants.controlnet_config(shapes, range(64))["proj_blocks"] == tuple(range(64))
    with pytest.raises(ValueError, match=r"not a ControlNet's: backbone\.0\.0\.weight and"):
        variants.controlnet_config({"projections.0.2.weight": (6, 2, 1, 1)})
    with pytest.raises(ValueError, match=r"backbone\.0\.weight has the shape \(2,\); it must have 4 dimensions"):
        variants.controlnet_config({**shapes, "backbone.0.weight": (2,)}, range(64))
