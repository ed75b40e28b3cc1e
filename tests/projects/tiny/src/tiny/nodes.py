"""What is computed, and a node that fails."""

import logging
import time
from pathlib import Path


def double(numbers):
    return [2 * number for number in numbers]


def scale(numbers, factor, pause):
    time.sleep(pause)
    return [factor * number for number in numbers]


def add(doubled, scaled):
    logging.getLogger(__name__).info("adding %d numbers", len(doubled) + len(scaled))
    return sum(doubled) + sum(scaled)


def report(total):
    return {"total": total, "cwd": Path.cwd().name}


def fail(numbers):
    raise ZeroDivisionError("no number left")  # the user's line


def behind(nothing):
    return nothing


def side(numbers):
    time.sleep(0.5)
    return len(numbers)
