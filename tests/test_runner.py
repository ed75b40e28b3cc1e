"""The runner in a flow: order, side by side, failure, release, tags."""

import asyncio
import gc
import logging
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PREFECT_3, MemoryDataset, Server, eventually
from kedro.framework.hooks import hook_impl
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog
from kedro.pipeline import node, pipeline
from kedro.runner import SequentialRunner
from prefect import flow

from register_prefect_flow import PrefectRunner


def run_in_flow(
    nodes: list[Any], inputs: dict[str, Any] | None = None, hooks: Any = None, **options: Any
) -> tuple[Any, list[Any]]:
    """Run nodes in a flow; return the flow run's state, and what the runner gave or raised."""
    catalog = DataCatalog({name: MemoryDataset(data) for name, data in (inputs or {}).items()})
    hook_manager = _create_hook_manager()
    if hooks:
        hook_manager.register(hooks)
    outcome: list[Any] = []

    @flow
    def any_flow() -> None:
        try:
            outcome.append(PrefectRunner(**options).run(pipeline(nodes), catalog, hook_manager))
        except Exception as error:
            outcome.append(error)
            raise

    return any_flow(return_state=True), outcome


def flow_run_id(state: Any) -> str:
    return str(state.state_details.flow_run_id)


def give(value: Any) -> Callable[[], Any]:
    return lambda: value


def add_one(number: int) -> int:
    return number + 1


def same(*values: Any) -> Any:
    return values[0]


def test_outputs_come_back_as_from_kedros_runners(in_process: Server) -> None:
    state, [outputs] = run_in_flow(
        [node(add_one, "a", "b"), node(same, ["b", "b"], "c", name="named")],  # names are optional
        {"a": 1},
    )
    assert state.is_completed()
    assert list(outputs) == ["c"]
    assert getattr(outputs["c"], "load", lambda: outputs["c"])() == 2


def test_nodes_run_side_by_side(in_process: Server) -> None:
    meeting = threading.Barrier(2, timeout=60)
    nodes = [node(lambda: meeting.wait(), None, name, name=name) for name in ("here", "there")]
    assert run_in_flow(nodes, max_workers=2)[0].is_completed()


def test_a_node_starts_when_its_inputs_are_there_whatever_else_goes_on(in_process: Server) -> None:
    second_ran = threading.Event()

    def slow() -> int:
        assert second_ran.wait(timeout=60), "the second layer waited for all of the first"
        return 1

    def second(first: int) -> int:
        second_ran.set()
        return first

    nodes = [
        node(slow, None, "slow_output", name="slow"),
        node(give(1), None, "first_output", name="first"),
        node(second, "first_output", "second_output", name="second"),
    ]
    assert run_in_flow(nodes, max_workers=2)[0].is_completed()


def test_no_more_nodes_at_once_than_max_workers(in_process: Server) -> None:
    lock, running, most = threading.Lock(), set(), []

    def work() -> int:
        me = object()
        with lock:
            running.add(me)
            most.append(len(running))
        time.sleep(0.3)
        with lock:
            running.remove(me)
        return 1

    nodes = [node(work, None, f"output_{i}", name=f"node_{i}") for i in range(6)]
    assert run_in_flow(nodes, max_workers=2)[0].is_completed()
    assert max(most) == 2


@pytest.mark.parametrize("max_workers", [0, -1])
def test_max_workers_below_one_is_refused(max_workers: int) -> None:
    with pytest.raises(ValueError, match=f"max_workers is {max_workers}"):
        PrefectRunner(max_workers=max_workers)


def random_nodes(log: list[str], count: int = 15) -> list[Any]:
    """Nodes that write their names down, each needing some of those before it."""

    def writer(name: str) -> Callable[..., str]:
        def write(*_: str) -> str:
            log.append(name)
            return name

        return write

    dice = random.Random(3)
    names = [f"node_{number}" for number in dice.sample(range(100), count)]
    return [
        node(
            writer(name),
            [f"{n}_output" for n in dice.sample(names[:i], min(i, dice.randrange(3)))] or None,
            f"{name}_output",
            name=name,
        )
        for i, name in enumerate(names)
    ]


def test_by_default_nodes_run_one_at_a_time_in_kedros_order_in_the_thread_of_the_flow(
    in_process: Server, caplog: pytest.LogCaptureFixture
) -> None:
    expected: list[str] = []
    SequentialRunner().run(pipeline(random_nodes(expected)), DataCatalog(), _create_hook_manager())
    order: list[str] = []
    threads: set[str] = set()
    order_and_thread = SimpleNamespace(
        append=lambda name: (order.append(name), threads.add(threading.current_thread().name))
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kedro"):
        assert run_in_flow(random_nodes(order_and_thread))[0].is_completed()
    assert order == expected
    assert threads == {"MainThread"} or not PREFECT_3, "Prefect 2 runs each in a thread of its own"
    messages = [record.getMessage() for record in caplog.records]
    [advice] = [message for message in messages if "side by side" in message]
    assert "15 nodes run one at a time. Up to 5 could run side by side" in advice
    assert "max_workers" in advice
    ends = [m.removeprefix("Completed node: ") for m in messages if m.startswith("Completed node")]
    assert ends == expected


def test_the_longest_path_starts_first(in_process: Server) -> None:
    order: list[str] = []

    def writer(name: str) -> Callable[..., int]:
        return lambda *_: order.append(name) or time.sleep(0.5) or 1

    nodes = [
        node(writer("a"), None, "a_output", name="a"),
        node(writer("b"), None, "b_output", name="b"),
        node(writer("y"), None, "y_output", name="y"),
        node(writer("z"), "y_output", "z_output", name="z"),
    ]
    assert run_in_flow(nodes, max_workers=2)[0].is_completed()
    assert "y" in order[:2]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


class ErrorHooks:
    """Writes down which nodes failed, and how they were run."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, Exception]] = []
        self.is_async: list[bool] = []

    @hook_impl
    def on_node_error(self, error: Exception, node: Any) -> None:
        self.errors.append((node.name, error))

    @hook_impl
    def before_node_run(self, is_async: bool) -> None:
        self.is_async.append(is_async)


def test_a_failure_stops_only_what_is_behind_it(
    in_process: Server, caplog: pytest.LogCaptureFixture
) -> None:
    error, hooks, ran = ZeroDivisionError("mine"), ErrorHooks(), []
    nodes = [
        node(give(1), None, "a", name="first"),
        node(raising(error), "a", "b", name="broken"),
        node(lambda b: ran.append("behind"), "b", "c", name="behind"),
        node(lambda c: ran.append("far_behind"), "c", None, name="far_behind"),
        node(lambda a: time.sleep(0.5) or 1, "a", "d", name="beside"),
        node(lambda d: ran.append("beside_too") or 2, "d", "e", name="beside_too"),
    ]
    with caplog.at_level(logging.WARNING, logger="kedro"):
        state, [raised] = run_in_flow(nodes, hooks=hooks)
    assert state.is_failed()
    assert raised is error
    assert raised.__traceback__ is not None
    assert ran == ["beside_too"]
    assert hooks.errors == [("broken", error)]
    in_process.await_states(
        flow_run_id(state),
        {
            "first": "Completed",
            "broken": "Failed",
            "behind": "NotReady",
            "far_behind": "NotReady",
            "beside": "Completed",
            "beside_too": "Completed",
        },
    )
    suggestion = "\n".join(record.getMessage() for record in caplog.records)
    assert "There are 3 nodes that have not run" in suggestion
    assert "--from-nodes" in suggestion


def leave(code: Any) -> Callable[..., Any]:
    return lambda *_: sys.exit(code)


@pytest.mark.parametrize("code", [0, 3, "no data today"])
def test_a_node_that_exits_fails_like_any_other(
    in_process: Server, caplog: pytest.LogCaptureFixture, code: Any
) -> None:
    ran: list[str] = []
    nodes = [
        node(leave(code), None, "a", name="leaving"),
        node(lambda a: ran.append("behind"), "a", "b", name="behind"),
        node(lambda: time.sleep(0.5) or 1, None, "c", name="beside"),
        node(lambda c: ran.append("beside_too"), "c", None, name="beside_too"),
    ]
    with caplog.at_level(logging.WARNING, logger="kedro"):
        state, [raised] = run_in_flow(nodes)
    assert state.is_failed()
    assert isinstance(raised, RuntimeError)
    assert str(raised) == f"Node 'leaving' called sys.exit({code})"
    assert ran == ["beside_too"]
    assert "There are 2 nodes that have not run" in caplog.text
    in_process.await_states(
        flow_run_id(state),
        {
            "leaving": "Failed",
            "behind": "NotReady",
            "beside": "Completed",
            "beside_too": "Completed",
        },
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_keyboard_interrupt_ends_the_run(in_process: Server) -> None:
    ran: list[str] = []
    nodes = [
        node(raising(KeyboardInterrupt()), None, "a", name="interrupted"),
        node(lambda: time.sleep(1) or 1, None, "b", name="beside"),
        node(lambda b: ran.append("late"), "b", None, name="late"),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_in_flow(nodes)
    assert not ran


class Unwritable(Exception):  # noqa: N818
    def __str__(self) -> str:
        return "\udc80 of mine"


class Untold(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise LookupError


def chained(text: str) -> Callable[..., Any]:
    def fail() -> None:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ValueError("short") from error

    return fail


HUGE = "many rows " * 1_000_000


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (raising(Unwritable()), "Unwritable", "\\udc80 of mine"),
        pytest.param(
            *(raising(ValueError(HUGE)), "ValueError", "many rows many"),
            marks=pytest.mark.one_lane,
        ),
        (raising(Untold()), "LookupError", ""),  # Kedro itself stumbles over it
        (chained(HUGE), "ValueError", "short"),
    ],
)
def test_text_that_prefect_cannot_bear_is_replaced(
    in_process: Server, caplog: pytest.LogCaptureFixture, function: Any, kind: str, text: str
) -> None:
    state, [raised] = run_in_flow([node(function, None, "a", name="telling")])
    assert type(raised).__name__ == kind, "hooks and callers get what the node raised"
    eventually(lambda: in_process.task_runs(flow_run_id(state)).get("telling"))
    in_process.await_states(flow_run_id(state), {"telling": "Failed"})
    run = in_process.task_runs(flow_run_id(state))["telling"]
    assert kind in run["state"]["message"]
    assert text in run["state"]["message"]
    assert len(run["state"]["message"]) < 11_000
    shown = [r for r in caplog.records if r.name.startswith("prefect")]
    assert all(len(str(r.exc_info)) + len(r.getMessage()) < 60_000 for r in shown)


def test_the_first_of_several_failures_is_raised(in_process: Server) -> None:
    late = threading.Event()

    def second() -> None:
        late.wait(timeout=60)
        raise ValueError("second")

    class Release(ErrorHooks):
        @hook_impl
        def on_node_error(self, error: Exception, node: Any) -> None:
            self.errors.append((node.name, error))
            threading.Timer(1, late.set).start()

    def be_slow(record: logging.LogRecord) -> bool:
        """Let Prefect end the task of the first after that of the second."""
        if "'first'" in record.getMessage():
            time.sleep(4)
        return True

    hooks, first = Release(), ZeroDivisionError("first")
    nodes = [
        node(second, None, "a", name="a_second"),
        node(raising(first), None, "b", name="b_first"),
    ]
    logging.getLogger("prefect.task_runs").addFilter(be_slow)
    try:
        _, [raised] = run_in_flow(nodes, hooks=hooks, max_workers=2)
    finally:
        logging.getLogger("prefect.task_runs").removeFilter(be_slow)
    assert raised is first
    assert [name for name, _ in hooks.errors] == ["b_first", "a_second"]


def test_when_nothing_ran_the_advice_is_to_try_again(
    in_process: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="kedro"):
        run_in_flow([node(raising(ValueError("no")), None, "a", name="only")])
    assert "No nodes ran. Repeat the previous command" in caplog.text


def test_progress_is_logged_as_kedro_logs_it(
    in_process: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="kedro"):
        run_in_flow([node(give(1), None, "a", name="only")])
    messages = [record.getMessage() for record in caplog.records]
    assert "Completed 1 out of 1 tasks" in messages
    assert any(message.startswith("Pipeline execution completed") for message in messages)


class Big:
    """What takes memory; `alive` knows how many of them there still are."""

    alive: "weakref.WeakSet[Big]" = weakref.WeakSet()

    def __init__(self) -> None:
        Big.alive.add(self)

    def __deepcopy__(self, memo: Any) -> "Big":  # which Kedro's datasets in memory hand out
        return Big()


def count_big(*_: Any) -> int:
    gc.collect()
    return len(Big.alive)


def test_data_is_released_after_its_last_reader(in_process: Server) -> None:
    counts: dict[str, int] = {}

    def use(name: str) -> Callable[..., int]:
        def count(*_: Any) -> int:
            counts[name] = count_big()
            return 1

        return count

    nodes = [
        node(lambda: Big(), None, "big", name="make"),
        node(use("reader_1"), "big", "one", name="reader_1"),
        node(use("reader_2"), ["big", "one"], "two", name="reader_2"),
        node(use("after"), "two", "three", name="after"),
    ]
    assert run_in_flow(nodes, max_workers=1)[0].is_completed()
    assert counts["reader_1"] > 0
    assert counts["reader_2"] > 0
    assert counts["after"] == 0


def test_pipeline_inputs_and_outputs_are_not_released(in_process: Server) -> None:
    nodes = [node(same, "a", "b", name="one"), node(same, ["b", "a"], "c", name="two")]
    catalog = DataCatalog({name: MemoryDataset() for name in "abc"})
    catalog.save("a", 5)

    @flow
    def any_flow() -> None:
        PrefectRunner().run(pipeline(nodes), catalog)

    any_flow()
    assert catalog.load("a") == catalog.load("c") == 5
    assert not catalog.exists("b")


@pytest.mark.parametrize("is_async", [True, False])
def test_is_async_reaches_kedro(in_process: Server, is_async: bool) -> None:
    hooks = ErrorHooks()
    run_in_flow([node(same, "a", "b", name="one")], {"a": 1}, hooks=hooks, is_async=is_async)
    assert hooks.is_async == [is_async]


def test_tasks_have_the_options_that_the_settings_name(in_process: Server) -> None:
    nodes = [node(give(1), None, f"output_{i}", name=f"node_{i}", tags=["api"]) for i in range(2)]
    options = {"tag:api": {"tags": ["api"], "retries": 1}, "node_1": {"retries": 2}}
    state, _ = run_in_flow(nodes, task_options=options)
    assert state.is_completed()
    eventually(lambda: len(in_process.task_runs(flow_run_id(state))) == 2)
    runs = in_process.task_runs(flow_run_id(state))
    assert {name: run["tags"] for name, run in runs.items()} == {
        "node_0": ["api"],
        "node_1": ["api"],
    }
    assert [runs[f"node_{i}"]["empirical_policy"]["retries"] for i in range(2)] == [1, 2]
    # By its key Prefect 2 finds a node's task run again when a flow run is retried.
    keys = {name: run["task_key"] for name, run in runs.items()}
    assert {name: key.split("/", 4)[4] for name, key in keys.items()} == {
        name: name for name in runs
    }


@pytest.mark.skipif(not PREFECT_3, reason="tasks of Prefect 2 block the event loop of their flow")
def test_it_works_in_an_async_flow(in_process: Server) -> None:
    catalog = DataCatalog({"output": MemoryDataset()})

    @flow
    async def async_flow() -> None:
        nodes = [node(give(1), None, "output", name="one", tags=["any"])]
        PrefectRunner().run(pipeline(nodes), catalog)

    asyncio.run(async_flow())
    assert catalog.load("output") == 1
