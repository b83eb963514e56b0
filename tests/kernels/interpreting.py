"""What a process needs in which Triton interprets its kernels, on a CPU."""

from types import SimpleNamespace
from typing import Any

import torch

from cascade import kernels
from cascade.kernels.e4m3 import E4M3, LARGEST


def run(name: str, *given: Any, **options: Any) -> Any:
    """A function of `kernels.triton`. It stands here so that the process imports none of the tests."""
    with torch.no_grad():
        return getattr(kernels.load("triton"), name)(*given, **options)


def mend() -> None:
    """Let Triton 3.6's interpreter run our kernels."""
    import triton.language as tl
    from triton.runtime import driver, interpreter

    from cascade.kernels import triton as ours

    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        # For each call of a function from a kernel, Triton patches its language again, which takes a third of the time.
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to restore

    patch_tensor = interpreter._patch_lang_tensor

    def mended(tensor: type, scope: Any) -> None:
        # The bounds of a loop: int() of an array with one number fails since numpy 2.4.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    convert = interpreter._convert_float

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        # To e4m3, Triton forgets to carry from the mantissa. GPUs round to nearest, and values beyond 448 become 448.
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(numbers, source, target, rounding)
        given = torch.from_numpy(numbers.copy())
        return torch.where(given.isnan(), given, given.clamp(-LARGEST, LARGEST)).to(E4M3).view(torch.uint8).numpy()

    def tanh(x: Any) -> Any:
        e = tl.exp(2 * x)
        return 1 - 2 / (e + 1)

    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = mended
    interpreter._convert_float = converted
    ours._tanh = tanh  # is an instruction of GPUs
    # There is no GPU to ask for its stream.
    driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0))
