"""Pipelines by shape, and the shortest time in which they can be run."""

import random

WORKERS = 8
CHAINS = 10
SEED = 4

Edges = dict[int, list[int]]


def wide(count: int) -> Edges:
    """Nodes that need nothing."""
    return {number: [] for number in range(count)}


def grid(count: int) -> Edges:
    """Ten chains side by side."""
    return {number: [number - CHAINS] if number >= CHAINS else [] for number in range(count)}


def chain(count: int) -> Edges:
    """Nodes each of which needs the one before."""
    return {number: [number - 1] if number else [] for number in range(count)}


def diamond(count: int) -> Edges:
    """One node, all others but the last, the last."""
    last = count - 1
    return {0: [], **{number: [0] for number in range(1, last)}, last: [*range(1, last)]}


def random_dag(count: int) -> Edges:
    """Nodes that need up to three of the twenty before them."""
    dice = random.Random(SEED)
    return {
        number: sorted(
            dice.sample(range(max(0, number - 20), number), dice.randint(0, min(3, number)))
        )
        for number in range(count)
    }


SHAPES = {
    "wide": wide,
    "grid": grid,
    "stored": grid,  # with a file for each output: see the catalog in project.py
    "chain": chain,
    "diamond": diamond,
    "random": random_dag,
}


def best_schedule(edges: Edges, workers: int = WORKERS) -> int:
    """Return in how many steps a list schedule by critical path runs nodes of one step each."""
    behind: Edges = {number: [] for number in edges}
    for number, needed in edges.items():
        for other in needed:
            behind[other].append(number)
    length: dict[int, int] = {}
    for number in sorted(edges, reverse=True):  # a node needs only nodes of smaller numbers
        length[number] = 1 + max((length[other] for other in behind[number]), default=0)
    waiting = {number: len(needed) for number, needed in edges.items()}
    ready = [number for number, count in waiting.items() if not count]
    steps = 0
    while ready:
        ready.sort(key=length.__getitem__, reverse=True)
        now, ready = ready[:workers], ready[workers:]
        for number in now:
            for other in behind[number]:
                waiting[other] -= 1
                if not waiting[other]:
                    ready.append(other)
        steps += 1
    return steps
