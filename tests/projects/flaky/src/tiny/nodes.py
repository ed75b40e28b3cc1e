"""Nodes that note that they have been run, two of which can be told to wait or to fail."""

import os
import time
from pathlib import Path


def note(name, number):
    with open("ran.txt", "a") as file:
        file.write(name + " ")
    return number


def save(numbers):
    return note("save", time.time_ns())


def keep(numbers):
    return note("keep", 1), time.time_ns()


def aside(numbers):
    return note("aside", 2)


def finish_aside(aside):
    return note("finish_aside", aside)


def flaky(saved, kept):
    note("flaky", 0)
    Path("pid.txt").write_text(str(os.getpid()))
    while Path("hang").exists():
        time.sleep(0.1)
    if not Path("mended").exists():
        raise RuntimeError("not yet")
    return {"saved": saved, "kept": kept}


def last(result):
    note("last", 0)
    while Path("last_hangs").exists():
        time.sleep(0.1)
    if Path("last_fails").exists():
        raise RuntimeError("not yet either")
    return result
