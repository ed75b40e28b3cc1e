"""A pipeline that fails until it is mended, added to the tiny project."""

from pathlib import Path

NODES = """
import os


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
"""

PIPELINE = """
    flaky = pipeline([
        node(nodes.save, "numbers", "saved", name="save"),
        node(nodes.keep, "numbers", ["kept", "kept_copy"], name="keep"),
        node(nodes.aside, "numbers", "aside", name="aside"),
        node(nodes.finish_aside, ["aside"], "side", name="finish_aside"),
        node(nodes.flaky, ["saved", "kept"], "result", name="flaky"),
        node(nodes.last, "result", "end", name="last"),
    ])
    return {"flaky": flaky, """

CATALOG = """
saved: {type: pickle.PickleDataset, filepath: data/saved.pickle, versioned: true}
kept_copy: {type: pickle.PickleDataset, filepath: data/kept.pickle, versioned: true}
result: {type: json.JSONDataset, filepath: data/result.json, versioned: true}
end: {type: json.JSONDataset, filepath: data/end.json}
"""
ALL = ["aside", "finish_aside", "flaky", "keep", "save"]


def write_flaky_pipeline(project: Path) -> Path:
    """Add the pipeline to the project, as `flaky`."""
    for name, text in (("src/tiny/nodes.py", NODES), ("conf/base/catalog.yml", CATALOG)):
        with (project / name).open("a") as file:
            file.write(text)
    registry = project / "src/tiny/pipeline_registry.py"
    registry.write_text(registry.read_text().replace("\n    return {", PIPELINE))
    return project


def ran(project: Path) -> list[str]:
    """The nodes that have been run since this was asked for."""
    path = project / "ran.txt"
    names = sorted(path.read_text().split()) if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def mend(project: Path) -> None:
    """Mend the code: what runs then is another function, in a node of the same name."""
    nodes = project / "src/tiny/nodes.py"
    nodes.write_text(nodes.read_text().replace('Path("mended").exists()', "True"))
