"""The stages in the order of the method: text -> Stage C -> Stage B -> Stage A -> pixels.

- ``text``: prompts -> embeddings (CLIP ViT-bigG/14).
- ``prior``: Stage C, embeddings -> semantic latents.
- ``decoder``: Stage B, semantic latents -> decoder latents.
- ``pixels``: Stage A, decoder latents -> pixels, in tiles where memory is short.
- ``encoder``: the way back, pixels -> semantic latents (EfficientNetV2-S).

Stages know networks and sampling. They don't know requests, batches or where weights are.
"""
