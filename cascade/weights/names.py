"""How files of weights are called. Needs no library, so that downloads start at once."""

SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Names of the networks' files in the standard form, the preferred ones first: in bfloat16 where there are several.
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = (".bf16", "", ".fp16", ".fp32")
# What else a component's folder may hold that is read.
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
# Folders of a repository that hold a component. In diffusers' combined pipelines, the prior's have a name before theirs.
COMPONENT_FOLDERS = frozenset(
    {
        "tokenizer",
        "text_encoder",
        "image_encoder",
        "feature_extractor",
        "prior",
        "decoder",
        "vqgan",
        "effnet",
        "previewer",
        "controlnet_canny",
        "controlnet_inpainting",
        "controlnet_super_resolution",
        "ip_adapter",
        "prior_prior",
        "prior_image_encoder",
        "prior_feature_extractor",
    }
)


def index_names(stem: str, variant: str) -> tuple[str, str]:
    """What the list of a network's shards may be called: diffusers has moved the variant."""
    return f"{stem}{SUFFIX}.index{variant}.json", f"{stem}{variant}{SUFFIX}.index.json"
