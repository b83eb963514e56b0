"""Many prompts on many GPUs, on Ray. Other commands do without this folder, and so does the container.

`table` reads the prompts, `run` fixes what each shard has, `maker` makes a shard's pictures, `shard` writes them, and `cluster`
spreads the shards over workers. Only `cluster` knows Ray.
"""
