"""Runs networks: places their weights, replays CUDA graphs, and retries with less when memory is short.

`Runner` (``runner``) is the only interface that the pipeline uses.

The life of a weight:

    file --load--> host --pack--> HostWeights --place--> WeightCache --use--> kernels --capture--> CUDA graph --replay
                    |            (pinned buffer)        (GPU, fixed addresses)
                    +--> GPU at once, in "resident"

1. Load. ``cascade.loading`` reads a network: onto the GPU in "resident" mode, onto the host in "offload" and "stream"
   (``placement`` chooses the mode).
2. Pack. ``packing`` copies a network's tensors into one pinned buffer: first those that every forward needs throughout, then
   each block's matrices.
3. Place. ``cache`` gives every network a region at fixed addresses in one buffer on the GPU. Regions overlap. In "stream", a
   network that exceeds the buffer keeps some blocks there. The matrices of its other blocks share four slots.
4. Use. `use(name)` uploads the missing parts of a region, and makes the GPU wait for them. `prefetch` uploads parts that do
   not overlap the running network. ``streaming`` uploads blocks into slots before they run.
5. Capture and replay. ``graphs`` captures a forward per input shape and replays it. Graphs read weights at fixed addresses.
   A network whose blocks are streamed runs without graphs.
6. Short of memory. ``retry`` makes the missing pictures again: without the graphs captured so far, then with half as many
   pictures at a time, then one by one without graphs. Weights stay where they are.

Also here: ``device`` chooses device and dtype, ``errors`` tells a lack of memory and a lost GPU from other errors,
``precompile`` compiles Triton kernels before the first picture, and ``waits`` keeps waits for the whole GPU apart from captures
of graphs in other threads.
"""
