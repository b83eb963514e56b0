"""Training LoRAs of Stage C: a folder or zip of pictures becomes one safetensors file.

- `pictures`: what is trained on, read from a folder or a zip, in buckets of one size each.
- `settings`: what may be chosen, and the recipe files that choose it.
- `adapters`: PEFT's layers in our networks; `words`: new words, and captions as the text encoder takes them.
- `data`: pictures and captions, encoded once.
- `file`: the file that is written.
- `run`: all of it, one training.

The task itself is `training.tasks.lora`.
"""
