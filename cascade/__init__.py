"""Stable Cascade: text, images or both in, images out, in three stages.

Stage C makes semantic latents, Stage B decoder latents of them, Stage A pixels.
"""

__version__ = "0.1.0"
