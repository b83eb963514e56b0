"""Adapters in a loaded model: finds those of a request, and writes them into the networks' weights.

- `lora`: `Lora`, an adapter as a request names it.
- `selection`: reads the files of a request, and assigns their tensors to this model's networks.
- `merging`: changes the weights in place, and restores the base weights exactly.
- `words`: learned words in prompts.

`cascade.weights.lora` reads the files, and computes the change of one weight.
"""
