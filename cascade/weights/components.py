"""The components of a model: their names in a model folder, their classes, and where the published ones come from."""

from pathlib import Path

from cascade.images.preprocessing import ClipPreprocessor
from cascade.networks.clip import TextTower, VisionTower
from cascade.networks.controlnet import KINDS, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.tokenizer import ClipTokenizer

# The number of channels that each ControlNet reads.
CONTROLNETS = {f"controlnet_{kind}": channels for kind, channels in KINDS.items()}
NETWORKS = {
    "text_encoder": TextTower,
    "image_encoder": VisionTower,
    "prior": StableCascadeUNet,
    "decoder": StableCascadeUNet,
    "vqgan": StageA,
    "effnet": SemanticEncoder,
    "previewer": Previewer,
    **dict.fromkeys(CONTROLNETS, ControlNet),
    "ip_adapter": IPAdapter,
}
PROCESSORS = {"tokenizer": ClipTokenizer, "feature_extractor": ClipPreprocessor}
PROCESSOR_FILES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "feature_extractor": (("preprocessor_config.json",),),
}
COMPONENTS = (*PROCESSORS, *NETWORKS)
# The extra folder of the adapter that makes few steps suffice, and its file.
TURBO = "turbo"
DISTILLED = f"{TURBO}/turbo.safetensors"
# Further folders, which other modules load. Their files are listed and checked with those of the components.
EXTRAS = ("safety_checker", TURBO)

# The components that every model needs, and the published repository that has each.
NEEDED = {
    "tokenizer": "stable-cascade-prior",
    "text_encoder": "stable-cascade-prior",
    "prior": "stable-cascade-prior",
    "decoder": "stable-cascade",
    "vqgan": "stable-cascade",
}


def component_files(root: Path) -> list[str]:
    """The files of all components and extras, as paths relative to ``root``, sorted."""
    files = (file for component in (*COMPONENTS, *EXTRAS) for file in (root / component).rglob("*") if file.is_file())
    return sorted(file.relative_to(root).as_posix() for file in files)
