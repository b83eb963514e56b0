"""Names of files and folders with weights. Needs no library, so that downloads start at once."""

SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Names of a network's file in the standard form, preferred ones first. bfloat16 is preferred.
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = (".bf16", "", ".fp16", ".fp32")
# Other files of a component's folder that are read.
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "preprocessor_config.json",
)
# Folders of a repository that hold a component. diffusers' combined pipelines put "prior_" before the prior's components.
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
    """The possible names of the index of a network's shards. They differ between versions of diffusers."""
    return f"{stem}{SUFFIX}.index{variant}.json", f"{stem}{variant}{SUFFIX}.index.json"
