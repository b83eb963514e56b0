"""Tables: the files of the published repositories, by component of a model folder.

Repositories are pinned to commits. Networks are downloaded in bfloat16 where that is published. Both repositories have the
same text encoder and tokenizer, so only one copy is downloaded. Sizes on disk: Stage C 7.2 GB (lite 2.1), Stage B 3.1 GB
(lite 1.4), text encoder 1.4 GB, Stage A 37 MB; ControlNets 1.2 GB, image encoder 0.6 GB, semantic encoder 82 MB,
previewer 16 MB, safety checker 0.3 GB.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at a commit."""

    name: str
    revision: str

    @property
    def folder(self) -> str:
        """Its sub-folder in a download: its name, preceded by the owner unless it is published. Owners may share names."""
        return self.name.rpartition("/")[2] if self in PUBLISHED else self.name.replace("/", "--")


@dataclass(frozen=True)
class Part:
    """Files that are downloaded together and make one component.

    Attributes:
        component: the sub-folder of the model folder.
        repository: the repository that has the files.
        files: paths in the repository.
        dtype: safetensors' name for the dtype of a network's parameters; None: not a network of this package.
    """

    component: str
    repository: Repository
    files: tuple[str, ...]
    dtype: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, as paths in the folder of a download."""
        return tuple(f"{self.repository.folder}/{file}" for file in self.files)

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of the authors' single files, without a configuration."""
        return self.dtype is not None and len(self.files) == 1


PRIOR = Repository("stabilityai/stable-cascade-prior", "7ca32c21c3b4d4e35bbb94fcfedfb4fa2259bd91")
DECODER = Repository("stabilityai/stable-cascade", "a89f66d459ae653e3b4d4f992a7c3789d0dc4d16")
SAFETY = Repository("Falconsai/nsfw_image_detection", "96cb0d0342c7afb80cab76ecc58b265fa44da256")
PUBLISHED = (PRIOR, DECODER, SAFETY)


def _network(component: str, repository: Repository, folder: str, weights: str) -> Part:
    """A network in the standard form: a folder with a configuration and a safetensors file."""
    return Part(component, repository, (f"{folder}/config.json", f"{folder}/{weights}"), "BF16")


def _checkpoint(component: str, weights: str) -> Part:
    """One of the authors' single safetensors files, in float32, without a configuration."""
    return Part(component, DECODER, (weights,), "F32")


_DIFFUSERS = "diffusion_pytorch_model.bf16.safetensors"
_TRANSFORMERS = "model.bf16.safetensors"

PARTS = {
    "tokenizer": Part("tokenizer", PRIOR, ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")),
    "text_encoder": _network("text_encoder", PRIOR, "text_encoder", _TRANSFORMERS),
    "prior": _network("prior", PRIOR, "prior", _DIFFUSERS),
    "prior_lite": _network("prior", PRIOR, "prior_lite", _DIFFUSERS),
    "decoder": _network("decoder", DECODER, "decoder", _DIFFUSERS),
    "decoder_lite": _network("decoder", DECODER, "decoder_lite", _DIFFUSERS),
    "vqgan": _network("vqgan", DECODER, "vqgan", _DIFFUSERS),
    "image_encoder": _network("image_encoder", PRIOR, "image_encoder", _TRANSFORMERS),
    "feature_extractor": Part("feature_extractor", PRIOR, ("feature_extractor/preprocessor_config.json",)),
    "effnet": _checkpoint("effnet", "effnet_encoder.safetensors"),
    "previewer": _checkpoint("previewer", "previewer.safetensors"),
    "controlnet_canny": _checkpoint("controlnet_canny", "controlnet/canny.safetensors"),
    "controlnet_inpainting": _checkpoint("controlnet_inpainting", "controlnet/inpainting.safetensors"),
    "controlnet_super_resolution": _checkpoint(
        "controlnet_super_resolution", "controlnet/super_resolution.safetensors"
    ),
    "safety_checker": Part("safety_checker", SAFETY, ("config.json", "model.safetensors", "preprocessor_config.json")),
}

# The parts that text-to-image needs: always, and by the options --prior and --decoder.
ALWAYS = ("tokenizer", "text_encoder", "vqgan")
PRIORS = {"full": "prior", "lite": "prior_lite"}
DECODERS = {"full": "decoder", "lite": "decoder_lite"}
# The parts that the option --with names.
EXTRAS = {
    "controlnet": ("controlnet_canny", "controlnet_inpainting", "controlnet_super_resolution"),
    "effnet": ("effnet",),
    "previewer": ("previewer",),
    "image-encoder": ("image_encoder", "feature_extractor"),
    "safety": ("safety_checker",),
}
