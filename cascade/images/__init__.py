"""Pictures that are returned."""
