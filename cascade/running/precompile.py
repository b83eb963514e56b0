"""Loads the Triton kernels before the first picture, in parallel, and compiles those that were not compiled before.

A kernel takes about 0.5 s to compile, and a model has some twenty. `kernels.compiled` reads those that
`scripts/compile-kernels` made. Triton caches the others on disk (TRITON_CACHE_DIR, else ~/.triton/cache).
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from cascade.kernels import origin
from cascade.kernels.parallel import in_threads
from cascade.kernels.stream import Product, Stream
from cascade.networks.fp8 import Fp8Linear
from cascade.networks.stage_a import MixingBlock, StageA
from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.running.device import current

logger = logging.getLogger(__name__)
SIDE = 8  # height and width of the blocks' inputs
LARGE_SIDE = 64  # has 4096 queries, with which attention takes larger blocks: `kernels.triton.LARGE_ATTENTION`
PRODUCTS = (F.linear, torch.addmm, torch._addmm_activation)


class WithoutProducts(TorchFunctionMode):
    """A context, of one thread, in which matrix products compute nothing: their results have no values.

    torch keeps a workspace for each thread that has called cuBLAS, as long as the process lives: 32 MiB on an H100, 8 on other
    GPUs. Sixteen threads would keep half a GiB, to multiply what nobody reads. To free the workspaces afterwards would also free
    those that the captured graphs of another model in this process use. Several `TorchDispatchMode` in threads would leave a flag
    of torch's set for the whole process, and import its compiler.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch._scaled_mm:
            return args[0].new_empty(len(args[0]), args[1].shape[1], dtype=kwargs["out_dtype"])
        if function not in PRODUCTS:
            return function(*args, **kwargs)
        if "out" in kwargs:
            return kwargs["out"]
        if function is F.linear:
            x, weight = args[:2]
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        _, first, second = args[:3]
        return first.new_empty(first.shape[0], second.shape[1])


def precompile(unets: list[StableCascadeUNet], vqgan: StageA) -> None:
    """Run a block of every kind and width once, if the networks use Triton kernels.

    Calls `forward` directly, so streaming hooks do not run. Weight values do not matter for compiling.
    """
    if vqgan.implementation == "plain":
        return
    start = time.perf_counter()
    jobs = jobs_of(unets, vqgan)
    in_threads(jobs)
    # In one thread alone, see `WithoutProducts`, so that cuBLAS has started before the first picture.
    one = torch.zeros(SIDE, SIDE, device=vqgan.device, dtype=vqgan.dtype)
    torch.mm(one, one)
    # Not the whole device: that would break a graph that another model of this process is capturing.
    torch.cuda.current_stream(vqgan.device).synchronize()
    taken = time.perf_counter() - start
    logger.info("Prepared the kernels of %d blocks in %.1f s: %s.", len(jobs), taken, origin(vqgan.device))


def jobs_of(unets: list[StableCascadeUNet], vqgan: StageA, *, large: bool = False) -> list[Callable[[], object]]:
    """Functions that run all kernels of these networks, one block each. The networks may be on the meta device.

    Args:
        large: also those that only pictures of about 2048x2048 and more use.
    """
    sides = (SIDE, LARGE_SIDE) if large else (SIDE,)
    found = [job for unet in unets for job in _jobs(unet, sides)] + _stage_a_jobs(vqgan)
    return [functools.partial(_run, vqgan.device, job) for job in found]


def _run(device: torch.device, job: Callable[[], object]) -> None:
    with current(device), torch.no_grad(), WithoutProducts():  # each thread has its own current device
        job()


def _jobs(unet: StableCascadeUNet, sides: Sequence[int]) -> list[Callable[[], object]]:
    jobs: dict[tuple, Callable[[], object]] = {}
    for block in unet.blocks():
        if isinstance(block, ResBlock):
            channels = block.depthwise.out_channels
            skip = block.channelwise[0].in_features > channels
            layer = type(block.channelwise[0])  # in e4m3, or not
            for pending in (False, True):
                jobs[ResBlock, channels, layer, skip, pending] = _res_block(block, channels, skip, pending, unet.device)
        elif isinstance(block, AttnBlock):
            channels = block.attention.channels
            for pending, side in product((False, True), sides):
                jobs[AttnBlock, channels, pending, side] = _attention_block(block, channels, pending, unet, side=side)
            if type(block.attention.to_qkv) is Fp8Linear:
                jobs[AttnBlock, channels, Product] = _attention_block(block, channels, True, unet, with_product=True)
            if unet.config.clip_text_in_channels is not None:  # its batches may have texts of different lengths
                for biased, side in product((False, True), sides):
                    jobs[AttnBlock, channels, "hides", biased, side] = _attention_block(
                        block, channels, False, unet, side=side, hides=True, biased=biased
                    )
    for channels in unet.config.block_out_channels:
        for pending in (False, True):
            jobs["norm", channels, pending] = _norm(channels, pending, unet)
    if unet.timestep_mappers is not None:
        jobs["maps",] = _maps(unet)
    return list(jobs.values())


def _stream(
    channels: int,
    pending: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    side: int = SIDE,
    with_product: bool = False,
) -> Stream:
    x = torch.zeros(1, side, side, channels, device=device, dtype=torch.float32)
    if not pending:
        return Stream(x)
    # Halves of one tensor, like the timestep mappers' results.
    scale, shift = torch.zeros(1, 2 * channels, device=device, dtype=torch.float32).chunk(2, dim=1)
    stream = Stream(x, torch.zeros(channels, device=device, dtype=dtype), scale, shift)
    return stream._replace(product=Product(x.to(dtype), x.new_zeros(1))) if with_product else stream


def _res_block(block: ResBlock, channels: int, skip: bool, pending: bool, device: torch.device) -> Callable[[], object]:
    def job() -> object:
        stream = _stream(channels, pending, device, block.depthwise.weight.dtype)
        return block.forward(stream, torch.zeros_like(stream.x) if skip else None)

    return job


def _attention_block(
    block: AttnBlock,
    channels: int,
    pending: bool,
    unet: StableCascadeUNet,
    *,
    side: int = SIDE,
    hides: bool = False,
    biased: bool = False,
    with_product: bool = False,
) -> Callable[[], object]:
    def job() -> object:
        tokens = torch.zeros(1, 4, unet.config.conditioning_dim, device=unet.device, dtype=unet.dtype)
        key_value = block.condition.forward(tokens, block.kv_mapper, block.attention)
        bias = torch.zeros(tokens.shape[:2], device=unet.device, dtype=torch.float32) if biased else None
        hidden = torch.zeros(len(tokens), 2, dtype=torch.int32, device=unet.device) if hides else None
        stream = _stream(channels, pending, unet.device, unet.dtype, side=side, with_product=with_product)
        return block.forward(stream, *key_value, bias, hidden)

    return job


def _maps(unet: StableCascadeUNet) -> Callable[[], object]:
    conditions = 1 + len(unet.config.timestep_conditioning_type)
    size = (conditions, 1, unet.config.timestep_ratio_embedding_dim)
    times = torch.zeros(size, device=unet.device, dtype=torch.float32)
    return lambda: unet.timestep_mappers.forward(times, unet.dtype)


def _norm(channels: int, pending: bool, unet: StableCascadeUNet) -> Callable[[], object]:
    return lambda: unet.kernels.norm(_stream(channels, pending, unet.device, unet.dtype), unet.dtype)


def _stage_a_jobs(vqgan: StageA) -> list[Callable[[], object]]:
    def job(block: nn.Module, channels: int) -> Callable[[], object]:
        x = torch.zeros(1, channels, SIDE, SIDE, device=vqgan.device, dtype=vqgan.dtype)
        return lambda: block(x.contiguous(memory_format=torch.channels_last))

    blocks = {block.channelwise[0].in_features: block for block in vqgan.up_blocks if isinstance(block, MixingBlock)}
    # The whole decoder, because its other convolutions load cuDNN, which the first picture would wait for.
    latents = torch.zeros(1, vqgan.config.latent_channels, SIDE, SIDE, device=vqgan.device, dtype=vqgan.dtype)
    return [*(job(block, channels) for channels, block in blocks.items()), lambda: vqgan.decode(latents)]
