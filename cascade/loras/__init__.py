"""Adapters in a loaded model: which ones a request wants, and the networks' weights with them.

- `lora`: what a request says, `Lora`.
- `selection`: the files of a request, read and placed in this model's networks.
- `merging`: weights become those of a selection, in place; the base comes back to the bit.
- `words`: learned words in prompts.

What the files hold, and what they do to one weight, is in `cascade.weights.lora`.
"""
