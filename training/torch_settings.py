"""How torch computes in a training."""

import torch
import torch._functorch.config


def set_up_torch() -> None:
    """Chooses TF32 for float32 products, and turns off two things with which gradients were wrong.

    With both, compiled by torch 2.11 for an H100, the gradients of the miniature's Stage C (512 pictures, trained weights) had an
    error of 30 times their norm, the largest in the first block's q, k and v; sizes that are not compiled had 0.01. Which of the
    two it is was not measured. Without both, a training that had diverged learned, at 58 instead of 54 steps a second.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # From 2.11 on, torch prefers cuDNN's attention on such GPUs. Its backward pass also gives NaN for some lengths if there is a
    # mask: github.com/pytorch/pytorch/issues/196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # A compiled backward pass otherwise reuses the memory of activations that the forward pass has kept for it.
    torch._functorch.config.donated_buffer = False
