"""Shards what a task trains over the processes: torch's FSDP 2.

Each process keeps its rows of every parameter (float32), of its gradient and of the optimizer's state. A module's parameters are
gathered in the compute dtype when its forward begins, and stay until its backward ends; gradients are averaged in float32 and
scattered. So the authors trained, too (SHARD_GRAD_OP).

accelerate's own way to FSDP 2 does not serve these networks. It saves state dicts, in which a layer has its published name and
not its parameters' (`cascade.networks.layout`). It checkpoints activations without the random state, so that dropout would have
another mask in the backward pass. And it shards on GPUs only. Processes, accumulation and logs are accelerate's here too.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cascade.networks.base import Network
from training.errors import TrainingError
from training.task import Task

# Compiled variants of one block: with and without a skip connection, each for every size of pictures.
MOST_VARIANTS = 256


def shard(task: Task, dtype: torch.dtype | None, *, compiled: bool) -> None:
    """Shards a task's parameters over all processes, in place. Parameters become DTensors.

    Args:
        task: on the training device, with the same float32 parameters in every process.
        dtype: in which networks compute; None: float32.
        compiled: whether the forwards of `Task.units` are compiled.

    Raises:
        TrainingError: there is only one process, or the task cannot be sharded.
    """
    if not task.units():
        raise TrainingError("[options] sharded is true; only scripts/train-stage-c trains sharded networks.")
    if not dist.is_initialized():
        raise TrainingError(
            "[options] sharded is true, which needs several processes, and only one trains; docs/training.md says how to start "
            "several."
        )
    # Modules change dtypes themselves: the residual stream stays float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if compiled:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    for unit in task.units():
        if compiled:
            # The forward alone: what FSDP does around it cannot be compiled.
            unit.forward = torch.compile(unit.forward, dynamic=False)
        fully_shard(unit, reshard_after_forward=False, mp_policy=policy)
    fully_shard(task, reshard_after_forward=False, mp_policy=policy)


def gather_once(task: Task, *, last: bool) -> None:
    """Prepares a micro-batch. Before the last one of a step, gradients are added up in each process, unreduced, and gathered
    parameters are kept.

    Args:
        task: sharded.
        last: whether the optimizer steps after this micro-batch.
    """
    task.set_requires_gradient_sync(last)
    task.set_reshard_after_backward(last)


def share_buffers(task: Task) -> None:
    """Gives all processes the buffers of the first one, as DistributedDataParallel does."""
    for buffer in task.buffers():
        dist.broadcast(buffer, 0)


def reshard(task: Task) -> None:
    """Frees gathered parameters. Without it, a forward without backward would leave them, and they would become outdated."""
    for module in task.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """This process's rows of sharded parameters, in the same memory; parameters that are not sharded as they are."""
    return [nn.Parameter(one.detach().to_local()) if isinstance(one, DTensor) else one for one in parameters]


def sharded_like(parameter: nn.Parameter, rows: Tensor) -> Tensor:
    """A sharded tensor, in the memory of this process's rows of it, with the shape of a sharded parameter."""
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales the gradients of sharded parameters so that their norm is at most ``most``, as `nn.utils.clip_grad_norm_`.

    With sharded gradients, torch's own function sums up the norm of each parameter by itself over the processes.

    Returns:
        Their norm before, a scalar.
    """
    gradients = [one.grad.to_local() for one in parameters if one.grad is not None]
    square = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole(network: Network) -> Network | None:
    """A network with its whole parameters: itself, if it is not sharded. Otherwise all processes must call this, and the first
    one gets a copy in main memory, the others None.
    """
    parameters = dict(network.named_parameters())
    if not any(isinstance(one, DTensor) for one in parameters.values()):
        return network
    first = dist.get_rank() == 0
    kept = {}
    for name, one in parameters.items():
        full = one.detach().full_tensor() if isinstance(one, DTensor) else one.detach()
        if first:
            kept[name] = full.cpu()
    if not first:
        return None
    with torch.device("meta"):
        copy = type(network).from_config(network.config)
    copy.load_state_dict(kept | dict(network.named_buffers()), assign=True)
    return copy
