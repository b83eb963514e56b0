"""What Cog does with files around a run, done in its place. Read in Cog and coglet 0.23.1.

Cog's worker downloads the inputs of `run` that are annotated with `cog.Path` before it calls `run`. It sets no limits,
hears no cancellation meanwhile, and leaves what it has downloaded when another download of the request fails. It reads
the annotations anew for every prediction, from the instance's `run`, and hands on text as it is. So `takes_urls` wraps
`run` in a function that says of these inputs that they are text; `serving.image_urls` downloads them. The schema keeps
`format: uri`: it is made from predict.py's source.

Cog also leaves three empty folders of every prediction; `sweep` removes them.
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

# One for each prediction, with the folders "inputs" and "outputs" in it.
COG_FOLDERS = Path("/tmp/coglet/predictions")
# Seconds. Cog makes them just before it calls `run`; in those of a running prediction it wants to find them.
SWEEP_AFTER = 60.0


def takes_urls(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, of which Cog believes that it takes text where it takes files: it hands on URLs as they are.

    Args:
        run: a bound method of which some inputs are annotated with cog.Path, or with a list of it.
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
    """Whether a type is cog.Path, or has it in it."""
    return kind is cog.Path or any(takes_files(one) for one in typing.get_args(kind))


def sweep() -> None:
    """Remove the empty folders of former predictions: Cog makes three for each, and they would use up the inodes."""
    with contextlib.suppress(OSError), os.scandir(COG_FOLDERS) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > SWEEP_AFTER:
                    for folder in ("inputs", "outputs", "."):
                        os.rmdir(Path(entry.path) / folder)
