"""The project's own commands."""

import click


@click.group(name="tiny")
def cli():
    """Commands of this project."""


@cli.command()
def run():
    """Run in a way of its own."""
