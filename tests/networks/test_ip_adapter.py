"""The IP-Adapter's network, and what it adds to Stage C's attention blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.networks.ip_adapter import PUBLISHED_BLOCKS, IPAdapter, attention_blocks
from cascade.networks.unet import Conditions, ImageTokens, StableCascadeUNet
from cascade.stages.prior import AdapterImage, images_by_step
from cascade.weights.variants import VARIANTS
from tests.components import make_image_encoder, make_ip_adapter, make_prior, shuffle
from tests.networks.test_unet import STAGE_C, inputs, make

SIZE = (6, 4)


def adapter_for(prior: StableCascadeUNet, **options: Any) -> IPAdapter:
    widths = tuple(block.attention.channels for block in attention_blocks(prior))
    torch.manual_seed(2)
    return make_ip_adapter(
        conditioning_dim=32, blocks=tuple(range(len(widths))), block_channels=widths, style_blocks=(), **options
    )


def predict(prior: StableCascadeUNet, conditions: Conditions) -> Tensor:
    torch.manual_seed(5)
    sample = torch.randn(2, 16, *SIZE)
    with torch.no_grad():
        return prior(sample, torch.tensor([0.3, 0.9]), conditions)


@pytest.fixture(scope="module")
def prior() -> StableCascadeUNet:
    return make(STAGE_C)


@pytest.fixture(scope="module")
def conditions(prior: StableCascadeUNet) -> Conditions:
    with torch.no_grad():
        return prior.condition(**inputs(STAGE_C))


def image_of(adapter: IPAdapter, seed: int = 3, **options: Any) -> AdapterImage:
    features = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return AdapterImage(adapter(features), **options)


def with_images(conditions: Conditions, *images: AdapterImage) -> Conditions:
    (made,) = images_by_step(conditions, images, 1, 1)
    return made


def test_names_and_shapes_are_those_of_ip_adapter_plus() -> None:
    with torch.device("meta"):
        state = IPAdapter().state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    expected = {
        "image_proj.latents": (1, 16, 1280),
        "image_proj.proj_in.weight": (1280, 1024),
        "image_proj.proj_in.bias": (1280,),
        "image_proj.proj_out.weight": (2048, 1280),
        "image_proj.proj_out.bias": (2048,),
        "image_proj.norm_out.weight": (2048,),
        "image_proj.norm_out.bias": (2048,),
    }
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            expected |= {f"image_proj.layers.{layer}.{norm}.{kind}": (1280,) for kind in ("weight", "bias")}
        expected |= {
            f"image_proj.layers.{layer}.0.to_q.weight": (1280, 1280),
            f"image_proj.layers.{layer}.0.to_kv.weight": (2560, 1280),
            f"image_proj.layers.{layer}.0.to_out.weight": (1280, 1280),
            f"image_proj.layers.{layer}.1.1.weight": (5120, 1280),
            f"image_proj.layers.{layer}.1.3.weight": (1280, 5120),
        }
    for block in range(0, 64, 4):
        expected |= {f"ip_adapter.{block}.to_{part}_ip.weight": (2048, 2048) for part in "kv"}
    assert shapes == expected


def test_it_fits_the_published_networks_by_default() -> None:
    configs = {variant.name: variant.config for variant in VARIANTS}
    with torch.device("meta"):
        adapter, prior, lite = IPAdapter(), *(StableCascadeUNet(**configs[name]) for name in ("prior", "prior_lite"))
    assert adapter.config.blocks == PUBLISHED_BLOCKS
    assert adapter.misfit(prior, 1024) is None
    assert "image encoder's have 1280" in adapter.misfit(prior, 1280)
    assert "width 2048 in attention block 0; this one has 1536" in adapter.misfit(lite, 1024)
    with torch.device("meta"):
        assert "attention block 64 of Stage C, which has 64" in IPAdapter(blocks=(0, 64)).misfit(prior, 1024)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": (1, 1)}, "none twice"),
        ({"blocks": (), "style_blocks": ()}, "at least one block"),
        ({"block_channels": (16, 16)}, "block_channels has 2 values; blocks has 3"),
        ({"composition_blocks": (0, 2)}, r"composition_blocks is \(0, 2\); each must be one of blocks"),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_ip_adapter(**options)


def test_untrained_it_changes_nothing(prior: StableCascadeUNet, conditions: Conditions) -> None:
    adapter = adapter_for(prior)
    adapter.copy_keys(prior)
    image = image_of(adapter)
    assert all(key.abs().max() > 0.1 and not value.any() for key, value in image.blocks.values())
    assert torch.equal(predict(prior, with_images(conditions, image)), predict(prior, conditions))


def test_copied_keys_rank_tokens_as_stage_c_does(prior: StableCascadeUNet) -> None:
    """What differs is a constant, which a softmax over these keys alone ignores."""
    adapter = adapter_for(prior)
    adapter.copy_keys(prior)
    tokens = torch.randn(1, 5, 32)
    for number, block in enumerate(attention_blocks(prior)):
        key, _ = block.condition(tokens, block.kv_mapper, block.attention)
        own, _ = adapter.ip_adapter[str(number)](torch.nn.functional.silu(tokens))
        own = own.unflatten(-1, (4, -1)).transpose(1, 2)
        difference = key - own
        torch.testing.assert_close(difference, difference[:, :, :1].expand_as(difference), rtol=1e-4, atol=1e-5)


def test_a_block_adds_a_second_softmax_before_its_projection(prior: StableCascadeUNet) -> None:
    """Against the formula of IP-Adapter, written out."""
    block = attention_blocks(prior)[0]
    attention = block.attention
    generator = torch.Generator().manual_seed(0)
    tokens, *context = (torch.randn(shape, generator=generator) for shape in ((2, 24, 32), *[(2, 4, 7, 8)] * 2))
    image = ImageTokens(*(torch.randn(2, 4, 3, 8, generator=generator) for _ in range(2)))
    share = torch.rand(1, 24, 1, generator=generator)
    with torch.no_grad():
        plain = attention(tokens, *context, True)
        made = attention(tokens, *context, True, images=(image,), shares=(share,))
        query = attention.to_qkv(tokens)[..., :32].unflatten(-1, (4, 8)).transpose(1, 2)
        weights = (query @ image.key.transpose(-1, -2) / 8**0.5).softmax(dim=-1)
        expected = plain + share * (weights @ image.value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(made, expected)


def test_scales_are_linear_in_a_block_and_images_are_summed(prior: StableCascadeUNet, conditions: Conditions) -> None:
    """Nothing is hidden between the scale and what a block adds."""
    adapter = shuffle(adapter_for(prior), 4)
    block, tokens = attention_blocks(prior)[0], torch.randn(2, 24, 32)

    def added(*images: AdapterImage) -> Tensor:
        made = with_images(conditions, *images)
        key, value = conditions.keys[0], conditions.values[0]
        with torch.no_grad():
            plain = block.attention(tokens, key, value, True)
            masks = [None if mask is None else mask.view(1, -1, 1) for mask in made.masks]
            return block.attention(tokens, key, value, True, images=made.images[0], shares=masks) - plain

    one, other = image_of(adapter, 3), image_of(adapter, 4)
    assert added(one).abs().mean() > 0.01
    for scale in (0.0, 0.25, 2.0):
        torch.testing.assert_close(added(one._replace(scale=scale)), scale * added(one), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        added(one._replace(scale=0.5), other), 0.5 * added(one) + added(other), rtol=1e-4, atol=1e-5
    )
    mask = torch.rand(1, 1, *SIZE)
    torch.testing.assert_close(added(one._replace(mask=mask)), mask.view(1, -1, 1) * added(one), rtol=1e-4, atol=1e-5)


def test_a_mask_acts_where_it_is_white(prior: StableCascadeUNet, conditions: Conditions) -> None:
    """In one block of one resolution; through the others it reaches everything."""
    adapter = shuffle(adapter_for(prior), 4)
    last = max(adapter.config.blocks)
    image = image_of(adapter)
    image = image._replace(blocks={last: image.blocks[last]})
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :2] = 1
    added: list[Tensor] = []
    hook = attention_blocks(prior)[last].register_forward_hook(lambda _, __, out: added.append(out.settle()))
    for one in (conditions, with_images(conditions, image._replace(mask=mask)), with_images(conditions, image)):
        predict(prior, one)
    hook.remove()
    plain, masked, everywhere = added
    assert torch.equal(masked[:, :, 2:], plain[:, :, 2:])
    assert torch.equal(masked[:, :, :2], everywhere[:, :, :2])
    assert not torch.equal(masked[:, :, :2], plain[:, :, :2])


def test_other_resolutions_of_a_level_resize_the_mask() -> None:
    config = STAGE_C | {"switch_level": (True,)}
    prior = make(config)
    with torch.no_grad():
        conditions = prior.condition(**inputs(config))
    image = image_of(shuffle(adapter_for(prior), 4), mask=torch.ones(1, 1, *SIZE))
    masked, everywhere = (with_images(conditions, one) for one in (image, image._replace(mask=None)))
    torch.testing.assert_close(predict(prior, masked), predict(prior, everywhere))


def test_the_unconditional_half_stays_stage_cs_own(prior: StableCascadeUNet, conditions: Conditions) -> None:
    image = image_of(shuffle(adapter_for(prior), 4))
    (guided,) = images_by_step(conditions, (image,), 1, 2)
    without, shown, both = predict(prior, conditions), with_images(conditions, image), predict(prior, guided)
    assert torch.equal(both[1:], without[1:])
    torch.testing.assert_close(both[:1], predict(prior, shown)[:1])
    assert not torch.equal(both[:1], without[:1])


def test_steps_share_their_tensors(conditions: Conditions, prior: StableCascadeUNet) -> None:
    adapter = shuffle(adapter_for(prior), 4)
    early, late = image_of(adapter, end=0.5), image_of(adapter, 4, start=0.25)
    by_step = images_by_step(conditions, (early, late), 8, 2)
    assert len({id(one) for one in by_step}) == 3
    assert all(by_step[first] is by_step[last] for first, last in ((0, 1), (2, 3), (4, 7)))
    used = [[bool(tokens.value.any()) for tokens in one.images[0]] for one in (by_step[0], by_step[2], by_step[4])]
    assert used == [[True, False], [True, True], [False, True]]
    assert images_by_step(conditions, (), 3, 2) == [conditions] * 3


def test_gradients_reach_the_adapter_alone() -> None:
    """With gradient checkpointing too, and with the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = make_prior()
        network.clf[1].weight.data.normal_()
        network.eval().requires_grad_(False)
        if checkpointing:
            network.enable_gradient_checkpointing()
        adapter = shuffle(make_ip_adapter(), 4).train()
        torch.manual_seed(0)
        text, pooled, features = torch.randn(1, 5, 32), torch.randn(1, 1, 24), torch.randn(1, 17, 16)
        condition = network.condition(pooled, text)
        tokens = {
            block: (ImageTokens(*(x.unflatten(-1, (2, -1)).transpose(1, 2) for x in pair)),)
            for block, pair in adapter(features).items()
        }
        condition = condition._replace(images=tokens, masks=(None,))
        network(torch.randn(1, 16, 3, 3), torch.rand(1), condition).square().mean().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(one is not None and one.abs().sum() > 0 for one in gradients[0])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_it_reads_what_the_image_encoder_gives() -> None:
    encoder, adapter = make_image_encoder(), shuffle(make_ip_adapter(), 4)
    with torch.no_grad():
        states = encoder(torch.randn(2, 3, 32, 32), output_hidden_states=True).hidden_states
        pairs = adapter(states[-2])
    assert len(states) == encoder.config.num_hidden_layers + 1
    assert {block: (tuple(key.shape), tuple(value.shape)) for block, (key, value) in pairs.items()} == dict.fromkeys(
        (0, 1, 3), ((2, 3, 16), (2, 3, 16))
    )
