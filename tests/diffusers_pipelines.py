"""diffusers' own Stable Cascade, around the weights of our networks: what ours is compared with."""

from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
from diffusers.models import StableCascadeUNet as TheirUNet
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade.networks.base import Network
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet

THEIRS = {StableCascadeUNet: TheirUNet, StageA: PaellaVQModel}


def twin(network: Network) -> ModelMixin:
    """diffusers' network of the same configuration, in eval mode, on the very tensors of ours: no second copy."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        other = THEIRS[type(network)](**config)
    other.load_state_dict(network.state_dict(), assign=True)
    return other.eval()


def make_pipelines(
    prior: StableCascadeUNet,
    decoder: StableCascadeUNet,
    vqgan: StageA,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModelWithProjection,
) -> tuple[StableCascadePriorPipeline, StableCascadeDecoderPipeline]:
    """The prior's and the decoder's pipeline, without progress bars. Networks: ours, of which they run the twins."""
    text: dict[str, Any] = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    pipelines = (
        StableCascadePriorPipeline(prior=twin(prior), scheduler=DDPMWuerstchenScheduler(), **text),
        StableCascadeDecoderPipeline(
            decoder=twin(decoder), vqgan=twin(vqgan), scheduler=DDPMWuerstchenScheduler(), **text
        ),
    )
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines
