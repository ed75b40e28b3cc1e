"""Pipelines named by shape, number of nodes and milliseconds of waiting."""
