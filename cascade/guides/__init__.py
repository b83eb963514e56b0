"""What steers Stage C besides the text.

- ``image_prompts``: images as embeddings, in addition to the text's (CLIP ViT-L/14).
- ``inpainting``: masks and larger canvases: which part of an image is repainted.
- ``controls``: images as edges, masked images or small images, which ControlNets read.
- ``controlnets``: the ControlNets, and their residuals for Stage C.

`request` uses ``inpainting`` and ``controls`` to check its inputs; these two know no network.
"""
