"""The smallest training on drawings: what its configuration has beside that of `tests.training.small`."""

DRAWN = """
data.source = "miniature.dataset:Drawings"
data.scenes = 64
data.unseen = 64
data.seed = 0
controlnet_canny.data = { scenes = 32, unsaid = 0.5 }
ip_adapter.data = { nameless = 0.3, others = 0.2 }
"""
