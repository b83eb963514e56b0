"""Between a caller and the engine: inputs, files, HTTP, Cog."""
