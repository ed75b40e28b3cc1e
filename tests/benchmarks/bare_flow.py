"""What Prefect does without Kedro: a flow of tasks, one after the other, that do nothing but log.

python bare_flow.py <number of tasks> <lines that each logs>
"""

import sys

from prefect import flow, get_run_logger, task


@task(persist_result=False)
def bare_task(number: int, lines: int) -> None:
    """Log so many lines."""
    for line in range(lines):
        get_run_logger().info("Line %d of task %d", line, number)


@flow
def bare_flow(count: int, lines: int = 0) -> None:
    """Call a task so often."""
    for number in range(count):
        bare_task(number, lines, return_state=True)


if __name__ == "__main__":
    bare_flow(*map(int, sys.argv[1:]))
