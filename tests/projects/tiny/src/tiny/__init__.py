"""A tiny, complete project."""
