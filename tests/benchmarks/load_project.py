"""The reference for registering: import what the script imports, and load a project.

python load_project.py <project> [work pool]

With a work pool, Prefect's own `deploy` registers a bare flow there as well: what is left for the
script to save.
"""

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
for work_pool in sys.argv[2:]:
    from bare_flow import bare_flow

    here = str(Path(__file__).parent)
    remote = bare_flow.from_source(source=here, entrypoint="bare_flow.py:bare_flow")
    remote.deploy(name="bare", work_pool_name=work_pool)  # type: ignore[union-attr]
