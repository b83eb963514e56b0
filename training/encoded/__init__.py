"""Training Stage C on pictures that were encoded once and are kept on disk, for trainings of any size.

`sources` reads pictures and captions from a folder or WebDataset shards, `encoding` encodes them, `shards` writes and reads what
they become, and `run` trains on it.
"""
