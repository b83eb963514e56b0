"""What the networks' blocks compute beside matrix products, in two implementations with the same functions.

    plain     torch. Any device, any dtype, differentiable.
    triton    GPU kernels for inference. CUDA, compute capability 8.0 or higher, bfloat16 or float16.

Which one runs when:

- A network is made with "plain". `use_kernels` of a network (`UsesKernels`) sets the implementation of all its blocks, once,
  after loading; `choose` says which one suits a device and a dtype, and `Cascade.load` calls both.
- Where autograd records (gradients are enabled), the plain functions run: the kernels have no backward pass.
- A kernel reads the weights of a layer instead of calling it only while that layer is an ordinary one (`layers.is_ordinary`).
  A layer that was replaced, wrapped or hooked (LoRA, quantisation) runs through its own forward, in either implementation.
- Shapes that a kernel does not serve (depthwise convolutions other than 3x3, heads of other than a multiple of 8 channels) run
  plainly.

"triton" changes the strides of the depthwise weights (not their shape or values), so call `use_kernels` before tensors get
fixed addresses (`running.packing.HostWeights`, CUDA graphs). A network with "triton" must run on a GPU.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from cascade.kernels import plain

IMPLEMENTATIONS = ("plain", "triton")
# Triton's and bfloat16's: Ampere.
CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """An implementation's name, "plain" or "triton", and the reason for it, a clause."""

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


class UsesKernels:
    """Base class of modules that call `plain` or `triton`, and of the networks made of them.

    Attributes:
        implementation: "plain" or "triton". Set it with `use_kernels`.
    """

    implementation = "plain"

    @property
    def kernels(self) -> ModuleType:
        """The functions to call now: those of `implementation`, or the plain ones where autograd records."""
        return plain if self.implementation == "plain" or torch.is_grad_enabled() else load(self.implementation)

    def use_kernels(self, name: str) -> None:
        """Set the implementation of this module and of all modules inside it: "plain" or "triton", see `choose`.

        Raises:
            ValueError: there is no such implementation.
            ImportError: Triton is not installed.
        """
        load(name)
        for module in self.modules():
            if isinstance(module, UsesKernels):
                module.implementation = name
                module.prepare()

    def prepare(self) -> None:
        """Called after the implementation was set: for blocks with weights that a kernel reads in another memory layout."""
