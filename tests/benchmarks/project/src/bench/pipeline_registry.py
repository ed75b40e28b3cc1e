"""Pipelines such as grid_100_0, named in PIPELINES: a process makes only those that it measures."""

import os
import time
from pathlib import Path

import numpy
from kedro.pipeline import node, pipeline

from bench.dags import SHAPES

times = []  # when each node started and ended


def wait(seconds):
    def work(*inputs):
        start = time.perf_counter()
        if seconds:
            time.sleep(seconds)
        times.append((start, time.perf_counter()))
        return 0

    return work


def count_up(millions):
    """Keep a CPU busy with Python code."""

    def work(*inputs):
        number = 0
        for _ in range(millions * 1_000_000):
            number += 1  # noqa: SIM113
        return 0

    return work


def hand_on(megabytes):
    """Make an array, or one from those of other nodes; say when, in a file: this may be a child."""

    def work(*inputs):
        start = time.perf_counter()
        total = inputs[0] + 1 if inputs else numpy.ones(megabytes * 125_000)
        for other in inputs[1:]:
            total += other
        with Path("data/handed_on.jsonl").open("a") as file:
            file.write(f"[{start}, {time.perf_counter()}]\n")
        return total

    return work


failed = []


def fail_once(work):
    def once(*inputs):
        if not failed:
            failed.append(True)
            raise RuntimeError("once")
        return work(*inputs)

    return once


def make(name):
    shape, count, size = name.split("_")
    kind = size.lstrip("0123456789")
    if kind == "mb":
        work = hand_on(int(size[:-2]))
    elif kind == "busy":
        work = count_up(int(size[:-4]))
    else:
        work = wait(int(size.removesuffix("fail")) / 1000)
    return pipeline(
        [
            node(
                fail_once(work) if (kind, number) == ("fail", 90) else work,
                [f"{name}_{other}" for other in needed] or None,
                f"{name}_{number}",
                name=f"node_{number}",
            )
            for number, needed in SHAPES[shape](int(count)).items()
        ]
    )


def register_pipelines():
    names = os.environ.get("PIPELINES", "stored_100_0").split()
    made = {name: make(name) for name in names}
    return {**made, "__default__": made[names[0]]}
