"""Replaces Cog's handling of input files, and removes the folders that it leaves. Written for Cog and coglet 0.23.1.

Cog's worker downloads the inputs of `run` that are annotated with `cog.Path` before it calls `run`. It sets no limits,
ignores cancellations while it downloads, and keeps the downloaded files when another download of the request fails. It
reads the annotations of the instance's `run` for every prediction, and passes text on unchanged. So `takes_urls` wraps
`run` in a function that annotates these inputs as text; `serving.image_urls` downloads them. The schema keeps
`format: uri`, because it is made from predict.py's source.

Cog also leaves three empty folders per prediction; `sweep` removes them.
"""

import contextlib
import functools
import os
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cog

# Has a folder for each prediction, which holds the folders "inputs" and "outputs".
COG_FOLDERS = Path("/tmp/coglet/predictions")
# Age in seconds from which `sweep` removes a folder. Cog makes it just before it calls `run`, and needs it until `run` ends.
SWEEP_AFTER = 60.0


def takes_urls(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `run` so that Cog passes URLs on as text instead of downloading them.

    Args:
        run: a bound method; some of its inputs are annotated with cog.Path, or with a list of it.
    """
    kinds = typing.get_type_hints(run)

    @functools.wraps(run)
    def run_with_urls(**inputs: Any) -> Any:
        sweep()
        return run(**inputs)

    run_with_urls.__annotations__ = {
        name: str if name != "return" and takes_files(kinds[name]) else kind
        for name, kind in run.__annotations__.items()
    }
    return run_with_urls


def takes_files(kind: Any) -> bool:
    """Whether a type is cog.Path or contains it."""
    return kind is cog.Path or any(takes_files(one) for one in typing.get_args(kind))


def sweep() -> None:
    """Remove the empty folders of earlier predictions. Cog makes three for each, which would use up the inodes."""
    with contextlib.suppress(OSError), os.scandir(COG_FOLDERS) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > SWEEP_AFTER:
                    for folder in ("inputs", "outputs", "."):
                        os.rmdir(Path(entry.path) / folder)
