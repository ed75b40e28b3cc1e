"""Ordinary data science code, which uses what is global to a process."""

import asyncio
import os
import random
import signal
import sqlite3
import threading
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from prefect import flow

connection = sqlite3.connect("habits.db", isolation_level=None)
connection.execute("create table if not exists numbers (number integer)")


def plot(number):
    def draw():
        plt.figure(figsize=(2, 1.5))
        for line in range(4):
            plt.plot([0, 1, 2], [line, number, line * number])
            time.sleep(0.02)
        plt.title(f"plot {number}")
        time.sleep(0.02)
        return plt.gcf()

    return draw


def sample(number):
    def draw():
        np.random.seed(number)
        random.seed(number)
        # At once, because Prefect's client draws from this generator, too: see README.
        numbers = [random.random() for _ in range(20)]
        for _ in range(20):
            time.sleep(0.002)
            numbers.append(float(np.random.rand()))
        return numbers

    return draw


def visit(number):
    def look():
        before, there = os.getcwd(), Path(f"data/folder_{number}")
        there.mkdir()
        os.chdir(there)
        time.sleep(0.05)
        Path("here.txt").write_text(str(number))
        time.sleep(0.05)
        found = sorted(path.name for path in Path().iterdir())
        os.chdir(before)
        return found

    return look


def alarm():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append("rung"))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.2)
    signal.signal(signal.SIGALRM, before)
    return rung, threading.current_thread() is threading.main_thread()


def warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            warnings.warn(f"number {number}")
            time.sleep(0.01)
    return [str(warning.message) for warning in caught]


def warn_not():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        time.sleep(0.02)
    return 1


def run_asyncio():
    async def add():
        await asyncio.sleep(0.01)
        return 1 + 1

    return asyncio.run(add())


@flow
def inner(number: int):
    return number + 1


def run_flow():
    return inner(41)


def read_variable():
    try:
        from prefect.variables import Variable
    except ImportError:  # Prefect 2.10
        from prefect import variables as Variable
    found = Variable.get("habit")
    return getattr(found, "value", found)


def fill():
    connection.execute("delete from numbers")
    connection.executemany("insert into numbers values (?)", [(1,), (2,), (3,)])
    return "filled"


def query(filled):
    return connection.execute("select sum(number) from numbers").fetchone()[0]


def to_cache():
    return {"cached": [1, 2, 3]}


def from_cache(cached):
    return cached["cached"]


def make_parts(numbers):
    return {f"part{number}": lambda number=number: number * 10 for number in numbers}


def sum_parts(parts):
    return sum(load() for load in parts.values())


def read_news(incoming):
    return sorted(incoming)


def to_table(numbers):
    return pd.DataFrame({"number": numbers})


def from_table(table):
    return int(table["number"].sum())


def yield_lines(numbers):
    for number in numbers:
        time.sleep(0.01)
        yield f"line {number}"


def replaced(numbers):
    return numbers


def keyed(prefixes, weights, chosen):
    pairs = [*prefixes.items(), *weights.items()]
    return [sorted(map(repr, pairs)), sorted(chosen)]


def write_middle(numbers):
    return {"mine": sum(numbers)}


def someone_else_writes(middle):
    newer = Path("data/middle.json/2099-01-01T00.00.00.000Z/middle.json")
    newer.parent.mkdir(parents=True)
    newer.write_text('{"mine": "no"}')
    return 1


def read_middle(middle, written):
    return middle


def note(name):
    with open("ran.txt", "a") as file:
        file.write(name + " ")


def to_name():
    note("to_name")
    return "a name"


def train(numbers):
    return {"model": sum(numbers)}, len(numbers)


def yield_and_fail(numbers):
    yield {"chunk": sum(numbers)}
    if not Path("yielded").exists():
        Path("yielded").touch()
        raise RuntimeError("after the first chunk")


def tell(numbers):
    return numbers


def use_late(late):
    note("use_late")
    return late


def fail_once(read, late):
    note("fail_once")
    if not Path("failed").exists():
        Path("failed").touch()
        raise RuntimeError("the first time")
    return [read, late]


def rest(seconds):
    def sleep():
        note(f"rest{seconds}")
        time.sleep(seconds)
        return seconds

    return sleep


def from_name(lines):
    return lines
