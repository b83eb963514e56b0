"""Which weights a result is of: a text that changes with the networks' weights and the sampler's settings alone."""

import hashlib
import json
from pathlib import Path

from cascade.weights import TURBO

ASIDE = ("previewer", "ip_adapter", TURBO)
"""Pictures do not depend on these, unless they are asked for."""


def fingerprint(folder: Path, *used: str) -> str | None:
    """Of the networks of a model folder, by the checksums in ``model.json``; None without that file.

    Args:
        used: those of `ASIDE` that count, too.
    """
    file = folder / "model.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    left = set(ASIDE) - set(used)
    weights = {
        path: digest
        for path, digest in content["files"].items()
        if path.endswith(".safetensors") and path.split("/")[0] not in left
    }
    text = json.dumps([content["sampler"], content["native_size"], weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
