"""The weights that a training changes, and what changes with them: the optimizer, the averages (EMA) and the checkpoint.

- `trained`: what the training loop does with them, in whichever form they are.
- `replicated`: every process has all of them (DDP). `sharded`: every process has a share (FSDP 2, see `fsdp`).
- `checkpoint`, `sharded_checkpoint`: their state on disk; `earlier_checkpoints` reads that of earlier versions.
"""
