"""Nodes that do what a runner may take for granted that nobody does."""

import asyncio
import atexit
import locale
import logging
import logging.config
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path


class PanicException(BaseException):  # as pyo3, and so polars, calls it
    """An error that is no Exception."""


class Empty(Exception):  # noqa: N818
    """An error that is false."""

    def __len__(self):
        return 0


class Untold(Exception):  # noqa: N818
    """An error that cannot be written."""

    def __str__(self):
        raise LookupError("no text")


class Locked(Exception):  # noqa: N818
    """An error that cannot be pickled."""

    def __init__(self, code, why):
        super().__init__(f"{code}: {why}")
        self.lock = threading.Lock()


def panic(numbers):
    raise PanicException("called `Option::unwrap()` on a `None` value")


def cancelled(numbers):
    raise asyncio.CancelledError("by a library")


def closed_generator(numbers):
    raise GeneratorExit("too early")


def stop_iteration(numbers):
    return next(number for number in numbers if number > 100)


def stop_async_iteration(numbers):
    raise StopAsyncIteration("no more")


def false_error(numbers):
    raise Empty("of no length")


def untold_error(numbers):
    raise Untold


def locked_error(numbers):
    raise Locked(7, "why")


def long_error(numbers):
    raise ValueError("many rows " * 300_000)


def error_without_unicode(numbers):
    raise ValueError("\udc80 of a file name")


def recursive(numbers):
    return recursive(numbers)


def out_of_memory(numbers):
    raise MemoryError("no room")


def times_out_itself(numbers):
    raise TimeoutError("a query took too long")


def asks(numbers):
    return input("how many? ")


def coroutine(numbers):
    async def count():
        return len(numbers)

    return count()


def exits_at_once(numbers):
    os._exit(3)


def kills_itself(numbers):
    os.kill(os.getpid(), signal.SIGKILL)


def closes_stdout(numbers):
    sys.stdout.close()
    return 1


def closes_stderr(numbers):
    sys.stderr.close()
    return 1


def moves(numbers):
    os.chdir("/")
    return 1


def forgets_its_path(numbers):
    sys.path.clear()
    return 1


def clears_the_environment(numbers):
    os.environ.clear()
    return 1


def sets_a_proxy(numbers):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):
        os.environ[name] = "http://127.0.0.1:9"
    return 1


def sets_certificates(numbers):
    os.environ["SSL_CERT_FILE"] = "/nowhere.pem"
    return 1


def sets_a_socket_timeout(numbers):
    socket.setdefaulttimeout(0.000_001)
    return 1


def replaces_logging(numbers):
    logging.config.dictConfig({"version": 1, "root": {"handlers": []}})
    logging.disable(logging.CRITICAL)
    return 1


def makes_warnings_errors(numbers):
    warnings.simplefilter("error")
    return 1


def lives_elsewhere(numbers):
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    locale.setlocale(locale.LC_ALL, "C")
    return 1


def sets_an_event_loop(numbers):
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    return 1


def writes_bytes(numbers):
    sys.stdout.buffer.write(b"\xff\x00" * 100_000)
    sys.stdout.flush()
    return 1


def count_in_a_fork(number):
    logging.getLogger("tiny.badly").warning("number %d in a fork %s", number, "x" * 6_000)
    return number


def forks_a_pool(numbers):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        return sum(pool.map(count_in_a_fork, range(40)))


def serve():
    time.sleep(60)


def terminates_a_fork(numbers):
    process = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    time.sleep(0.5)
    process.terminate()
    process.join()
    return process.exitcode


def interrupts_a_program(numbers):
    program = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    program.stdout.readline()  # Now it has its handlers.
    program.send_signal(signal.SIGINT)
    program.stdout.close()
    return program.wait()


class Unreadable(Exception):  # noqa: N818
    """An error that can be pickled, and not be made again."""

    def __init__(self, code, why):
        super().__init__(f"{code}: {why}")


def logs_what_cannot_be_read(numbers):
    logging.getLogger("tiny.badly").warning("with an error", extra={"own": Unreadable(7, "why")})
    return 1


def leaves_a_thread(numbers):
    def write():
        time.sleep(2)
        Path("data/by_a_thread.txt").write_text("written")

    threading.Thread(target=write).start()
    return 1


def writes_at_exit(numbers):
    atexit.register(Path("data/at_exit.txt").write_text, "written")
    return 1


def starts_a_program(numbers):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    null = subprocess.DEVNULL
    program = subprocess.Popen(command, start_new_session=True, stdout=null, stderr=null)
    Path("pid.txt").write_text(str(program.pid))
    return 1


def seeds_and_draws(numbers):
    random.seed(42)
    drawn = []
    for _ in range(27):  # seconds, in which a websocket client sends a ping
        time.sleep(1)
        drawn.append(random.random())
    return drawn


def handles_signals(numbers):
    rung = []
    signal.signal(signal.SIGALRM, lambda *_: rung.append("rung"))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.2)
    return len(rung)


def beside(numbers):
    return sum(numbers)


def behind(bad):
    return 1
