"""Imports transformers and diffusers without what serving never uses: half of the time that a process took to start.

Both are used for their base classes, CLIP and the classes of the safety checker. Their base modules also import torch's
compiler (for decorators that mark functions for it) and its distributed tensors, read the file lists of all installed
packages, each for itself, and transformers reads the source of all its models twice. Python's own means prevent that while
these modules are imported: a module in `sys.modules`, and functions that are replaced for the time.

What is imported later, such as torch's compiler, is whole. Only code of transformers that shards models over several GPUs
does not work in such a process; the engine imported without `serving`, and training, do not use this.
"""

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

COMPILER = "torch._dynamo"
LEFT_OUT = (COMPILER, f"{COMPILER}._trace_wrapped_higher_order_op")
# Decorators for the compiler.
MARKS = ("allow_in_graph", "assume_constant_result", "disable")


def import_lean() -> None:
    """Import what the engine uses of transformers and diffusers, if neither was imported before."""
    if {"transformers", "diffusers", COMPILER} & sys.modules.keys():
        return
    import torch

    lists = functools.cache(importlib.metadata.packages_distributions)
    with ExitStack() as stack:
        stack.enter_context(_without_compiler(torch))
        stack.enter_context(mock.patch.object(torch.distributed, "is_available", return_value=False))
        stack.enter_context(mock.patch.object(importlib.metadata, "packages_distributions", lists))
        _import_models()
        importlib.import_module("transformers.models.clip.modeling_clip")
        importlib.import_module("transformers.image_processing_backends")
        importlib.import_module("diffusers.models.modeling_utils")


def _import_models() -> None:
    """Import transformers.models without its list of all classes. `transformers` has made its own by then."""
    importlib.import_module("transformers")
    utilities = sys.modules["transformers.utils.import_utils"]
    listed = utilities.define_import_structure

    def define(path: Any, prefix: str | None = None) -> Any:
        return {} if str(path).endswith("/transformers/models/__init__.py") else listed(path, prefix)

    with mock.patch.object(utilities, "define_import_structure", define):
        importlib.import_module("transformers.models")


@contextmanager
def _without_compiler(torch: ModuleType) -> Iterator[None]:
    """A context in which an import of torch's compiler finds a module that has only its decorators."""
    stands_in, submodule = (ModuleType(name) for name in LEFT_OUT)
    stands_in.__path__ = []
    for mark in MARKS:
        setattr(stands_in, mark, _mark(mark))
    submodule.TransformGetItemToIndex = _TransformGetItemToIndex
    sys.modules |= {LEFT_OUT[0]: stands_in, LEFT_OUT[1]: submodule}
    torch._dynamo = stands_in
    try:
        yield
    finally:
        for name in LEFT_OUT:
            del sys.modules[name]
        del torch._dynamo


def _mark(name: str) -> Callable[..., Any]:
    """A decorator of the compiler. Within the context it changes nothing; afterwards it is the compiler's own."""

    def mark(function: Callable | None = None, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(COMPILER)
        if getattr(module, name) is not mark:
            return getattr(module, name)(function, *arguments, **options)
        return (lambda given: given) if function is None else function

    return mark


class _TransformGetItemToIndex:
    """torch's class of this name, which is imported when it is used."""

    def __new__(cls) -> Any:
        return importlib.import_module(LEFT_OUT[1]).TransformGetItemToIndex()
