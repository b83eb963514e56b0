"""Checks that the networks of a configuration and of the model folder fit together, before anything is trained."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade.networks.base import without_values
from cascade.networks.ip_adapter import attention_blocks
from cascade.sizes import ENCODER_STRIDE, STAGE_A_FACTOR, semantic_size
from cascade.weights import NETWORKS
from cascade.weights.settings import PUBLISHED_STAGE_A, PUBLISHED_STAGE_A_SCALE
from training.configuration import NETWORK_TABLES
from training.errors import FILE_ERRORS, TrainingError, summary
from training.stages import STAGES
from training.tasks.controlnet import res_blocks

EQUAL = (
    (("text_encoder", "projection_dim"), ("decoder", "clip_text_pooled_in_channels")),
    (("text_encoder", "projection_dim"), ("prior", "clip_text_pooled_in_channels")),
    (("text_encoder", "hidden_size"), ("prior", "clip_text_in_channels")),
    (("image_encoder", "projection_dim"), ("prior", "clip_image_in_channels")),
    (("image_encoder", "hidden_size"), ("ip_adapter", "feature_dim")),
    (("prior", "conditioning_dim"), ("ip_adapter", "conditioning_dim")),
    (("effnet", "latent_channels"), ("decoder", "effnet_in_channels")),
    (("effnet", "latent_channels"), ("previewer", "latent_channels")),
    (("effnet", "latent_channels"), ("prior", "in_channels")),
    (("effnet", "latent_channels"), ("prior", "out_channels")),
    (("vqgan", "latent_channels"), ("decoder", "in_channels")),
    (("vqgan", "latent_channels"), ("decoder", "out_channels")),
)
"""Pairs of values, of two components, that must be equal."""
TOWERS = (("text_encoder", "projection_dim"), ("image_encoder", "projection_dim"))
"""Must be equal only if both towers are trained together; the published ones differ."""


def table_of(component: str) -> str:
    """The configuration's table for a component."""
    return f"{component}_network" if component in ("previewer", "ip_adapter") else component


def new_values(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a network that will be made, as the configuration's table gives them.

    Stage A's scale, if left out, is that of the published weights. The class's default is that of the published configuration.
    """
    own = {"scale_factor": PUBLISHED_STAGE_A_SCALE} if component == "vqgan" else {}
    return {**own, **config[table_of(component)]}


@dataclass(frozen=True)
class Part:
    """A component of the model folder, or one that will be made.

    Attributes:
        label: its name in an error.
        values: its complete configuration.
        made: whether it is in the model folder.
        network: with these values, on the meta device.
    """

    label: str
    values: Mapping[str, Any]
    made: bool
    network: Any


def find_part(component: str, config: Mapping[str, Any], model: Path, *, anew: bool = False) -> Part | None:
    """A component as the model folder has it, otherwise as the configuration describes it; None if neither does.

    Args:
        component: its name in a model folder.
        config, model: the configuration's tables; the model folder.
        anew: whether to ignore the model folder.

    Raises:
        TrainingError: its configuration is damaged, or no network can be built from it.
    """
    folder, table = model / component, table_of(component)
    if folder.is_dir() and not anew:
        label = str(folder)
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            values = {name: value for name, value in values.items() if not name.startswith("_")}
        except FILE_ERRORS as error:
            raise TrainingError(f"{folder / 'config.json'} cannot be read: {summary(error)}.") from error
    elif table in config:
        label, values = f"[{table}]", new_values(component, config)
    else:
        return None
    parameters = inspect.signature(NETWORKS[component]).parameters
    values = {name: one.default for name, one in parameters.items() if one.default is not one.empty} | values
    if component in dict(TOWERS):
        _check_heads(label, values["hidden_size"], values["num_attention_heads"])
    try:
        with torch.device("meta"), without_values():
            network = NETWORKS[component](**{name: value for name, value in values.items() if name in parameters})
    except Exception as error:  # for wrong values, networks raise all kinds of errors
        raise TrainingError(f"No {component} can be built from {label}: {summary(error)}.") from error
    return Part(label, values, made=label != f"[{table}]", network=network)


def _check_heads(label: str, width: int, heads: int) -> None:
    """Attention heads must divide the width. The UNets check this themselves."""
    if heads < 1 or width % heads:
        raise TrainingError(f"{label}: num_attention_heads, {heads}, does not divide hidden_size, {width}.")


def check_agreement(config: Mapping[str, Any], model: Path, stage: str) -> None:
    """Checks that all components fit together, and that the configuration has the tables that a stage needs.

    For a component that is in the model folder, its own configuration is used, not the tables.

    Args:
        config: the configuration's tables, checked by `configuration.check_tables`.
        model: the model folder.
        stage: the stage to be trained, a name in `ORDER`.

    Raises:
        TrainingError: a table is missing, or two components do not fit.
    """
    plan = STAGES.get(stage)
    own = () if plan is None else plan.trains
    if stage not in config:
        raise TrainingError(f"The configuration has no table [{stage}].")
    parts = {
        component: part
        for component in (table.removesuffix("_network") for table in NETWORK_TABLES)
        if (part := find_part(component, config, model, anew=component in own and plan.anew)) is not None
    }
    for component in own:
        if component not in parts and not plan.control and not plan.further and not plan.adapts:
            raise TrainingError(f"The configuration has no table [{table_of(component)}], which {stage} needs.")
    if plan is not None and plan.adapts and "model" not in config:
        raise TrainingError(f"The configuration has no table [model], which {stage} needs.")
    for (one, name), (other, other_name) in (*EQUAL, TOWERS):
        if one not in parts or other not in parts:
            continue
        first, second = parts[one], parts[other]
        together = not first.made and not second.made
        if ((one, name), (other, other_name)) != TOWERS or together:
            _check_equal(first, name, second, other_name)
    _check_factors(parts)
    _check_pictures(config, parts)
    _check_controlnets(config, model, parts, stage)
    _check_ip_adapter(parts)


def _check_equal(first: Part, name: str, second: Part, other: str) -> None:
    if first.values[name] != second.values[other]:
        raise TrainingError(
            f"{first.label} {name} is {first.values[name]}, and {second.label} {other} is {second.values[other]}; they must "
            "be equal."
        )


def _check_factors(parts: Mapping[str, Part]) -> None:
    """Stage A must shrink pictures 4 times, and the semantic encoder 32 times; all other code relies on it.

    A new Stage A must not look like the published one, whose scale is not that of its configuration (`build.stage_a_scale`).
    """
    if "vqgan" in parts:
        values, label = parts["vqgan"].values, parts["vqgan"].label
        factor = values["up_down_scale_factor"] * 2 ** (values["levels"] - 1)
        if factor != STAGE_A_FACTOR:
            raise TrainingError(
                f"{label}: up_down_scale_factor and levels shrink pictures {factor} times; they must shrink them "
                f"{STAGE_A_FACTOR} times."
            )
        if values["latent_channels"] != 4:
            raise TrainingError(f"{label} latent_channels is {values['latent_channels']}; it must be 4.")
        published = all(values[name] == value for name, value in PUBLISHED_STAGE_A.items())
        if published and not parts["vqgan"].made:
            width, scale = PUBLISHED_STAGE_A.values()
            raise TrainingError(
                f"{label} scale_factor is {scale}; with embed_dim {width} it must be another number, because these two are "
                f"taken for the published Stage A, which is decoded with {PUBLISHED_STAGE_A_SCALE}."
            )
    if "effnet" in parts:
        shrunk = 2 * math.prod(parts["effnet"].values["strides"])
        if shrunk != ENCODER_STRIDE:
            raise TrainingError(
                f"{parts['effnet'].label}: strides shrink pictures {shrunk} times, including the first convolution's 2; "
                f"they must shrink them {ENCODER_STRIDE} times."
            )


def _check_pictures(config: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Patches must tile the latents of every picture size; Stage A's crop must fit into a picture."""
    size = config["data"]["size"]
    sizes = [(size, size), *map(tuple, config["data"].get("other_sizes", ()))]
    for height, width in sizes:
        latents = {
            "decoder": (height // STAGE_A_FACTOR, width // STAGE_A_FACTOR),
            "prior": semantic_size(height, width),
        }
        for component, sides in latents.items():
            if component in parts and any(side % parts[component].values["patch_size"] for side in sides):
                raise TrainingError(
                    f"{parts[component].label} patch_size is {parts[component].values['patch_size']}; it does not divide the "
                    f"{sides[1]}x{sides[0]} latents of {width}x{height} pixels."
                )
    crop = config.get("stage_a", {}).get("task", {}).get("crop", size)
    if crop % STAGE_A_FACTOR or not STAGE_A_FACTOR <= crop <= size:
        raise TrainingError(
            f"[stage_a] task crop is {crop}; it must be a multiple of {STAGE_A_FACTOR}, at most [data] size, {size}."
        )


def _check_controlnets(config: Mapping[str, Any], model: Path, parts: Mapping[str, Part], stage: str) -> None:
    """ControlNets must add to ResBlocks that Stage C has."""
    plan = STAGES.get(stage)
    kinds = [name for name, one in STAGES.items() if one.control and (model / name).is_dir()]
    wanted = [("[controlnet] proj_blocks", config["controlnet"]["proj_blocks"])] if "controlnet" in config else []
    if plan is not None and plan.control:
        if stage in kinds:
            part = find_part(stage, config, model)
            wanted = [(f"{part.label} proj_blocks", part.values["proj_blocks"])]
        elif not wanted:
            raise TrainingError(f"The configuration has no table [controlnet], which {stage} needs.")
    if "prior" not in parts:
        return
    there = res_blocks(parts["prior"].values)
    for label, blocks in wanted:
        if len(set(blocks)) != len(blocks):
            raise TrainingError(f"{label} is {list(blocks)}; each ResBlock may occur only once.")
        for block in blocks:
            if not 0 <= block < there:
                raise TrainingError(
                    f"{label} holds {block}; {parts['prior'].label} has {there} ResBlocks, from 0 to {there - 1}."
                )


def _check_ip_adapter(parts: Mapping[str, Part]) -> None:
    """The IP-Adapter must be for attention blocks that Stage C has, of their widths."""
    if "ip_adapter" not in parts or "prior" not in parts:
        return
    adapter, prior = parts["ip_adapter"], parts["prior"]
    there = [block.attention.channels for block in attention_blocks(prior.network)]
    for block, width in adapter.network.widths.items():
        if not 0 <= block < len(there):
            raise TrainingError(
                f"{adapter.label} blocks holds {block}; {prior.label} has {len(there)} attention blocks, from 0 to "
                f"{len(there) - 1}."
            )
        if width != there[block]:
            raise TrainingError(
                f"{adapter.label} block_channels is {width} for block {block}, and {prior.label} is {there[block]} wide there; "
                "they must be equal."
            )
