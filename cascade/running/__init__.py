"""How networks run: where their weights are, how their kernels are launched, and what happens when memory is short.

`Runner` (``runner``) is the front. The pipeline sees nothing else of this folder.

The life of a weight:

    file --load--> host --pack--> HostWeights --place--> WeightCache --use--> kernels --capture--> CUDA graph --replay
                    |            (pinned buffer)        (GPU, fixed addresses)
                    +--> GPU at once, in "resident"

1. Load. ``loading`` reads a network. In "resident", it goes to the GPU at once. In "offload" and "stream", it stays on the
   host (``placement`` chooses the mode).
2. Pack. ``packing`` lays a network's tensors side by side in one pinned buffer: first what is needed whenever the network
   runs, then each block's matrices.
3. Place. ``cache`` gives every network a region at fixed addresses in one buffer on the GPU, where regions overlap. In
   "stream", a network that exceeds the buffer keeps some blocks there. The others' matrices share four slots.
4. Use. `use(name)` uploads what is missing, and makes the GPU wait for it. `prefetch` uploads what fits beside the running
   network. ``streaming`` uploads blocks into slots ahead of the blocks that need them.
5. Capture and replay. ``graphs`` captures a forward per input shape and replays it. Graphs read weights at fixed addresses.
   A network whose blocks are streamed runs without.
6. Short of memory. ``retry`` repeats what is missing: without the graphs captured so far, then with half as many pictures at
   a time, then one by one without graphs. Weights stay where they are.

Besides: ``device`` chooses device and dtype, ``errors`` tells a lack of memory and a lost GPU from other errors, and
``precompile`` compiles Triton kernels before the first picture.
"""
