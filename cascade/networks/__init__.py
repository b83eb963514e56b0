"""The networks of Stable Cascade, one file each: torch modules that know nothing of sampling, prompts or files."""
