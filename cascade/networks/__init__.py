"""The networks of Stable Cascade, one file each: plain torch modules, knowing nothing of sampling, prompts or files."""
