"""What lies between a caller and the engine: files, HTTP, Cog."""
