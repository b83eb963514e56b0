"""The operations of the networks' blocks other than matrix products, in two implementations with the same functions.

    plain     torch. Any device, any dtype, differentiable.
    triton    GPU kernels for inference. CUDA, compute capability 8.0 or higher, bfloat16 or float16.

How one is chosen:

- A network is made with "plain". `UsesKernels.use_kernels` sets the implementation of all its blocks, once, after loading.
  `choose` returns the one for a device and a dtype. `Cascade.load` calls both.
- While gradients are enabled, the plain functions run, because the kernels have no backward pass.
- A kernel reads a layer's weights, instead of calling the layer, only if it is an ordinary one (`layers.is_ordinary`), and a
  function takes its matrix only if it is that or one of `networks.eight_bits` (`layers.is_readable`). Layers that were replaced,
  wrapped or hooked (LoRA, other quantisation) run through their own forward in both implementations.
- The plain functions run for shapes that a kernel does not support: depthwise convolutions other than 3x3, and attention heads
  whose channels are not a multiple of 8.

"triton" changes the strides of the depthwise weights (not their shape or values), so call `use_kernels` before tensors get
fixed addresses (`running.packing.HostWeights`, CUDA graphs). A network with "triton" must run on a GPU.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

from cascade.kernels import e4m3, plain

IMPLEMENTATIONS = ("plain", "triton")
# The lowest compute capability for Triton and bfloat16: Ampere.
CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """An implementation's name, "plain" or "triton", and a clause with the reason for it."""

    name: str
    reason: str


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation for networks of this dtype that run on this device."""
    if device.type != "cuda":
        return Choice("plain", f"the kernels need a CUDA GPU, and the device is {device}")
    if torch.version.hip is not None:
        return Choice("plain", "the kernels use instructions of NVIDIA GPUs")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(
            "plain", f"the kernels need bfloat16 or float16, and the dtype is {str(dtype).removeprefix('torch.')}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        needed, found = (".".join(map(str, one)) for one in (CAPABILITY, capability))
        return Choice("plain", f"the kernels need compute capability {needed}, and the GPU has {found}")
    try:
        load("triton")
    except ImportError:
        return Choice("plain", "Triton is not installed, which makes the networks slower")
    return Choice("triton", f"the GPU has compute capability {'.'.join(map(str, capability))}")


def lacks_e4m3(device: torch.device, dtype: torch.dtype) -> str | None:
    """A clause that says why networks of this dtype cannot multiply in e4m3 on this device; None: they can."""
    if device.type != "cuda":
        return f"products in 8 bits need a CUDA GPU, and the device is {device}"
    if torch.version.hip is not None:
        return "products in 8 bits need a GPU of NVIDIA"
    if dtype != torch.bfloat16:
        return f"products in 8 bits need bfloat16, and the dtype is {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < e4m3.CAPABILITY:
        needed, found = (".".join(map(str, one)) for one in (e4m3.CAPABILITY, capability))
        return f"products in 8 bits need compute capability {needed}, and the GPU has {found}"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """The module of an implementation.

    Raises:
        ValueError: there is no such implementation.
        ImportError: Triton is not installed.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"The implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
    return plain if name == "plain" else importlib.import_module("cascade.kernels.triton")


def origin(device: torch.device) -> str:
    """A clause for the log: how many of this process's Triton kernels had been compiled before, for this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return importlib.import_module("cascade.kernels.compiled").described(10 * major + minor)


class UsesKernels:
    """Base class of modules that call `plain` or `triton`, and of the networks made of them.

    Attributes:
        implementation: "plain" or "triton". Set it with `use_kernels`.
    """

    implementation = "plain"

    @property
    def kernels(self) -> ModuleType:
        """The module of functions to call now: `implementation`'s, or the plain one while gradients are enabled."""
        return plain if self.implementation == "plain" or torch.is_grad_enabled() else load(self.implementation)

    def use_kernels(self, name: str) -> None:
        """Set the implementation of this module and of all modules inside it: "plain" or "triton", see `choose`.

        Raises:
            ValueError: there is no such implementation.
            ImportError: Triton is not installed.
        """
        use_kernels(self, name)

    def prepare(self) -> None:
        """Called when the implementation has been set. Blocks override it to change the memory layout of their weights."""


def use_kernels(network: nn.Module, name: str) -> None:
    """`UsesKernels.use_kernels`, for a network of any class: sets the implementation of those modules in it that have one."""
    load(name)
    for module in network.modules():
        if isinstance(module, UsesKernels):
            module.implementation = name
            module.prepare()
