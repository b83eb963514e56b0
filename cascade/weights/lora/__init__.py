"""Adapters: LoRA and similar kinds, from every program that trains them for Stable Cascade.

    adapter = Adapter.read("style.safetensors")                      # what a file holds
    placed = place(adapter, {"prior": shapes, ...}, vocabulary)      # where that belongs in a model's networks
    weight = merged(weight, [(change, 0.8), ...])                    # one tensor with several adapters, in float32

- `files`: safetensors files, PEFT's folders, archives; `parts`: what keys consist of; `layers`: how programs spell the
  networks' layers; `peft`, `authors`: what stands beside the tensors; `formats`: which program's a file is.
- `algorithms`: what each kind of adapter adds to a weight; `changes`: that, bound to a file's tensors.
- `placing`: all of it comes together; `fitting`: what the tensors of one layer change; `words`: learned words.
- `refusal`: why an adapter does not fit. `foreign` and `whole`: which other model a file is for, and which networks it holds
  whole.

Knows no network: names and shapes of tensors are enough.
"""

from cascade.weights.lora.adapter import Adapter
from cascade.weights.lora.changes import Change, merged
from cascade.weights.lora.placing import NETWORKS, Placed, place
from cascade.weights.lora.words import Word

__all__ = ["NETWORKS", "Adapter", "Change", "Placed", "Word", "merged", "place"]
