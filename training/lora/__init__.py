"""Training LoRAs of Stage C: a folder or zip of pictures becomes one safetensors file.

- `pictures`: the training pictures, read from a folder or a zip, in buckets of one size each.
- `settings`: the settings, and recipe files.
- `adapters`: PEFT's layers in our networks; `words`: new words, and captions as the text encoder takes them.
- `data`: pictures and captions, encoded once.
- `file`: the file that is written.
- `run`: one training, from start to end.

The task itself is `training.tasks.lora`.
"""
