"""The text "parameters" that AUTOMATIC1111's web UI writes, and that Civitai and most viewers read.

Its grammar: the prompt; a line that begins with ``Negative prompt: ``; and a last line of ``Name: value`` pairs,
separated by commas. A value with a comma, a colon or a quotation mark is a JSON string. Prompts cannot be escaped. So
text in a prompt that looks like one of these keys gets a space before its colon, and control characters become spaces.
The JSON record holds the prompts unchanged.
"""

import json
import re

from serving.record import Record

# Some readers search for these keys anywhere, others only at the start of a line.
KEYS = re.compile(r"(Negative prompt|Steps|Template):")
NEWLINES = re.compile(r"\r\n?")
# All control characters but tab and newline.
UNREADABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LONE_SURROGATES = re.compile(r"[\ud800-\udfff]")


def infotext(record: Record) -> str:
    """The text for one picture, without prompts if the record has none. Empty if Stage C did not make the picture."""
    if "steps_prior" not in record.inputs:
        return ""
    inputs, picture, model = record.inputs, record.picture, record.origin.model
    pairs = {
        "Steps": inputs["steps_prior"],
        "Sampler": record.sampler.upper(),
        "CFG scale": f"{inputs['guidance_scale_prior']:g}",
        "Seed": picture["seed"],
        "Size": f"{picture['width']}x{picture['height']}",
        "Model hash": model.get("sha256", "")[:10],
        "Model": model["name"],
        "Denoising strength": f"{inputs['prompt_strength']:g}" if "prompt_strength" in inputs else "",
        "Decoder steps": inputs["steps_decoder"],
        "Decoder CFG scale": f"{inputs['guidance_scale_decoder']:g}",
        "Lora hashes": ", ".join(f"{lora.name}: {lora.sha256[:12]}" for lora in record.loras),
        # Not a bare number: A1111 would take it for its own version, and change its settings to match.
        "Version": f"Stable Cascade {record.origin.versions['cascade']}",
    }
    settings = ", ".join(f"{name}: {quoted(str(value))}" for name, value in pairs.items() if value != "")
    prompt = readable(inputs.get("prompt", ""))
    negative = readable(inputs.get("negative_prompt", ""))
    lines = [prompt, f"Negative prompt: {negative}" if negative else "", settings]
    return "\n".join(line for line in lines if line)


def readable(prompt: str) -> str:
    """A prompt without anything that would break the grammar."""
    text = KEYS.sub(r"\1 :", NEWLINES.sub("\n", prompt))
    return LONE_SURROGATES.sub("\ufffd", UNREADABLE.sub(" ", text)).strip()


def quoted(value: str) -> str:
    """A value of the last line, as a JSON string if it needs one."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:"\n]', value) else value
