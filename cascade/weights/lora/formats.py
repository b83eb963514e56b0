"""Recognises the program that wrote an adapter by its keys. Only for messages: nothing else depends on it."""

from collections.abc import Collection, Mapping

from cascade.weights.lora.parts import Part

AUTHORS = "the authors' format"
TEXTUAL_INVERSION = "a textual inversion"

LATE_KOHYA = "kohya's format (since 25 February 2024; ComfyUI's names)"
# By prefix, then by the first of these pieces that occurs in a layer's name.
SPELLINGS: tuple[tuple[str, str, str], ...] = (
    ("lora_unet_", "_in_proj_", "OneTrainer's format KOHYA_LORA (since July 2026)"),
    ("lora_unet_", "_attn_out_proj", LATE_KOHYA),
    ("lora_unet_", "_attn_to_out", "kohya's format of 22 to 25 February 2024"),
    ("lora_unet_", "_attn_to_", LATE_KOHYA),
    ("lora_unet_", "", "kohya's format"),
    ("lora_prior_unet_", "_attn_to_out_proj", "OneTrainer's format of 20 to 23 February 2024"),
    ("lora_prior_unet_", "_attention_to_", "OneTrainer's format before 20 February 2024"),
    ("lora_prior_unet_", "", "OneTrainer's format LEGACY_LORA (since 23 February 2024)"),
    ("diffusion_model.", ".in_proj.", "OneTrainer's format COMFY_LORA"),
    ("diffusion_model.", "", "ComfyUI's format"),
    ("model.diffusion_model.", "", "ComfyUI's format"),
    ("unet.", ".in_proj.", "OneTrainer's format OMI_LORA (April 2025 to July 2026)"),
    ("unet.", "", "diffusers' format"),
    ("prior.", "", "OneTrainer's format DIFFUSERS_LORA"),
    ("lycoris_", "", "LyCORIS' format (SimpleTuner)"),
    ("base_model.model.", "", "PEFT's format"),
    ("lora_prior_te_", "", "OneTrainer's format LEGACY_LORA"),
    ("lora_te_", "", "kohya's format"),
    ("lora_te2_", "", "kohya's format"),
    ("text_encoders.clip_g.transformer.", "", "ComfyUI's format"),
    ("text_encoder.", "", "diffusers' format"),
    ("clip_g.", "", "OneTrainer's format OMI_LORA (April 2025 to July 2026)"),
    ("", ".in_proj.", "OneTrainer's format ORIGINAL_LORA"),
    ("", "", "a format without prefixes"),
)
JOINED = "OneTrainer's format LEGACY_LORA (April 2025 to July 2026)"
BEFORE_ATTENTION = "kohya's format before 22 February 2024 (without attention)"


def title(parts: Collection[Part], metadata: Mapping[str, str]) -> str:
    """The usual name of the format of an adapter whose keys have these parts."""
    if any(part.joined and part.name not in ("up", "down") for part in parts):
        return JOINED
    for prefix, piece, found in SPELLINGS:
        if any(part.prefix == prefix and piece in f"{part.layer}." for part in parts):
            if found == "kohya's format" and "ss_network_module" in metadata and prefix == "lora_unet_":
                return BEFORE_ATTENTION
            return found
    return "an unknown format"
