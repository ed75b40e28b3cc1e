"""The project's nodes in kedro-dagster's in-process executor, in an environment that has it.

python dagster_run.py <project> <file that gets the seconds of a run>

The project is translated, and has run once, when the clock starts: as in a process that stays.
Datasets stay in memory. Dagster keeps its events in files, where its UI would find them.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import dagster
from kedro_dagster import KedroProjectTranslator

project = Path(sys.argv[1])
os.chdir(project)
found = KedroProjectTranslator(env="base", project_path=project).to_dagster()
definitions = dagster.Definitions(
    assets=list(found.named_assets.values()),
    resources={**found.named_resources, "io_manager": dagster.mem_io_manager},
    jobs=list(found.named_jobs.values()),
    executor=dagster.in_process_executor,
)
job = definitions.resolve_job_def("base__default")
with (
    tempfile.TemporaryDirectory() as folder,
    dagster.DagsterInstance.local_temp(folder) as instance,
):
    assert job.execute_in_process(instance=instance).success
    start = time.perf_counter()
    assert job.execute_in_process(instance=instance).success
    Path(sys.argv[2]).write_text(str(time.perf_counter() - start))
