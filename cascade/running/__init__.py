"""How the networks run: on which device, in which precision, and what happens when memory is short or CUDA fails.

    device.py   chooses the device and the dtype; makes the engine's device the current one
    errors.py   tells an out-of-memory error, and a GPU that is lost, from other errors
    retry.py    makes pictures in parts, and tries again with less when memory does not suffice

Placement of weights is in `cascade.memory`, CUDA graphs in `cascade.graphs`, compiled kernels in `cascade.warm_up`.
"""
