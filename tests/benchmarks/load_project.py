"""The reference for registering: import what the script imports, and load a project."""

import sys
from pathlib import Path

import click  # noqa: F401
import prefect  # noqa: F401
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

project = Path(sys.argv[1])
bootstrap_project(project)
with KedroSession.create(project_path=project, env="base") as session:
    assert session.load_context().catalog
assert pipelines["__default__"].nodes
