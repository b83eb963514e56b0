"""The base class of all networks: a torch module with a configuration, in diffusers' files.

Files are those of diffusers' `ModelMixin` and `ConfigMixin`: ``config.json`` with the arguments of ``__init__``, and
safetensors, in shards if they are large. These classes are not used themselves: to import them takes 2 s, because they import
torch's compiler and, for quantisation that these networks do not use, transformers.
"""

import functools
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

CONFIG = "config.json"
# What a value of a configuration is called, by the type of the argument.
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}


class Config(dict):
    """A network's configuration: names and values, read as attributes too. Not to be changed, but by `register_to_config`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no {name}") from None


def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a network's ``__init__`` so that its arguments become the network's configuration before it runs.

    It then raises ValueError for a value that has not the type of its argument, if that is one of `KINDS` or a union of them.
    """
    names = list(inspect.signature(init).parameters.values())[1:]  # without self
    defaults = {one.name: one.default for one in names if one.default is not inspect.Parameter.empty}

    @functools.wraps(init)
    def registered(self: "Network", *values: Any, **named: Any) -> None:
        given = dict(zip((one.name for one in names), values, strict=False)) | named
        for one in names:
            if one.name in given:
                _check_type(one.name, given[one.name], one.annotation)
        self.register_to_config(**defaults | given)
        init(self, *values, **named)

    return registered


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Raise a ValueError if a value's type is not the annotated one. Only annotations of `KINDS` are checked."""
    allowed = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if not all(kind in KINDS for kind in allowed):
        return
    # In JSON, 1 is a number like 1.0; in Python, True is an int.
    fits = allowed + ((int,) if float in allowed else ())
    if type(value) not in fits:
        expected = " or ".join(KINDS[kind] for kind in allowed)
        raise ValueError(f"{name} is {value!r}; it must be {expected}")


class Network(nn.Module):
    """A torch module with a configuration.

    Attributes:
        config: the arguments of ``__init__``, and whatever else the file had from which it was made.
    """

    config: Config
    # The file of the weights, without its ending.
    weights_name: ClassVar[str] = "diffusion_pytorch_model"

    def register_to_config(self, /, **values: Any) -> None:
        """Set values of the configuration."""
        self.config = Config({**getattr(self, "config", {}), **values})

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter of a floating-point type."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a network from a configuration. What ``__init__`` does not know is kept in `config`, and changes nothing."""
        known = set(inspect.signature(cls).parameters)  # without self
        network = cls(**{name: value for name, value in config.items() if name in known})
        network.register_to_config(**{name: value for name, value in config.items() if name not in known})
        return network

    def described(self) -> dict[str, Any]:
        """What ``config.json`` tells other programs of the class."""
        return {"_class_name": type(self).__name__}

    @classmethod
    def load_config(cls, folder: str | PathLike[str]) -> dict[str, Any]:
        """The configuration in a folder.

        Raises:
            OSError, ValueError: there is none, or it is not JSON.
        """
        return json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> Self:
        """Read a network, in evaluation mode, from a folder with its configuration and weights.

        Args:
            folder: see the module.
            dtype: of the weights; None: float32.

        Raises:
            OSError, ValueError, RuntimeError: a file is missing, damaged, or does not fit the configuration.
        """
        from huggingface_hub import load_torch_model

        with without_values():
            network = cls.from_config(cls.load_config(folder)).to(dtype or torch.float32)
        file = Path(folder, f"{cls.weights_name}.safetensors")
        pattern = f"{cls.weights_name}{{suffix}}.safetensors"
        load_torch_model(network, file if file.is_file() else folder, strict=True, filename_pattern=pattern)
        return network.eval()

    def save_config(self, folder: str | PathLike[str]) -> None:
        """Write the configuration into a folder, which is made."""
        values = {**self.config, **self.described()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def save_pretrained(self, folder: str | PathLike[str], max_shard_size: str = "10GB") -> None:
        """Write the configuration and the weights into a folder, which is made.

        Args:
            folder: see the module.
            max_shard_size: larger weights become several files and an index.
        """
        from huggingface_hub import save_torch_state_dict

        self.save_config(folder)
        pattern = f"{self.weights_name}{{suffix}}.safetensors"
        save_torch_state_dict(self.state_dict(), folder, filename_pattern=pattern, max_shard_size=max_shard_size)

    def enable_gradient_checkpointing(self, run: Callable[..., Any] | None = None) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            run: (block, *arguments) -> the block's result; None: every block is recomputed.

        Raises:
            ValueError: the network cannot.
        """
        if not hasattr(self, "gradient_checkpointing"):
            raise ValueError(f"{type(self).__name__} cannot recompute its blocks.")
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = run or _recomputed


class _WithoutValues(TorchFunctionMode):
    """Skips whatever gives a new parameter its values."""

    SKIPPED: ClassVar = {torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.fill_, torch.Tensor.zero_}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        given: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        named = named or {}
        if function in self.SKIPPED or getattr(function, "__module__", None) == "torch.nn.init":
            return given[0] if given else named["tensor"]
        return function(*given, **named)


def without_values() -> AbstractContextManager[Any]:
    """A context in which networks are made without initial values, for weights that are read from a file.

    For the meta device, torch would compute them by code that imports its compiler, in 1.5 s. Acts on this thread only.
    """
    return _WithoutValues()


def _recomputed(block: nn.Module, *arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *arguments, use_reentrant=False)
