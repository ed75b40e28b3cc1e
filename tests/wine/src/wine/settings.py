"""Kedro's defaults serve this project."""
