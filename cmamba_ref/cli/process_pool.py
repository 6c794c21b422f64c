"""A process pool that survives worker crashes.

A worker that is killed, out of memory or by a crash in a library, breaks the executor of the
standard library, and that of loky, which then lose all in-flight items. Here those items are set
aside, and each is tried again in a process of its own when all others are done: only an item that
kills this one too is given up, and by then it has all the memory.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# After this long, a process that has been asked to end is made to.
TERMINATE_TIMEOUT_S = 5


def spread(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    prepare: Callable[[], None],
    report: Callable[[Item, Result | None], None],
) -> None:
    """Do `work` on every item, in fresh processes.

    Everything that goes into a process is pickled. After an exception, Ctrl-C included, no process
    is left.

    Args:
        processes: how many at most at a time.
        prepare: runs once in each process, before any work; it must not raise.
        report: callback, called in this process with each item and its result; None for an item
            that ended its process.

    Raises:
        Exception: what `work` or `report` raised.
    """
    waiting, suspects = deque(items), []
    while waiting:
        suspects += _drain(work, waiting, processes, prepare, report)
    for item in suspects:
        if _drain(work, deque([item]), 1, prepare, report):
            report(item, None)


def _drain(
    work: Callable[[Item], Result],
    waiting: deque[Item],
    processes: int,
    prepare: Callable[[], None],
    report: Callable[[Item, Result | None], None],
) -> list[Item]:
    """Go on until nothing waits or a process dies; returns what was in work at that moment."""
    running: dict[Future[Result], Item] = {}
    with _executor(processes, prepare) as executor:
        try:
            while waiting or running:
                # No more than are at work: what else the executor held would be under suspicion.
                while waiting and len(running) < processes:
                    with _ctrl_c_kept_from_children():
                        future = executor.submit(_work, work, waiting[0])
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    report(running.pop(future), result)
        except BrokenProcessPool:
            return list(running.values())
    return []


@contextmanager
def _executor(processes: int, prepare: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """An executor whose processes end with the block, and at once if it raises."""
    others = set(multiprocessing.active_children())
    # Not forked: threads, of which torch has several, do not survive that.
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, spawn, _prepare, (prepare,))
    try:
        yield executor
    except BaseException:
        ours = set(multiprocessing.active_children()) - others
        for process in ours:
            process.terminate()
        for process in ours:
            process.join(TERMINATE_TIMEOUT_S)
            process.kill()
        # Last, and waiting: the thread of the executor collects its processes too, and one counts
        # as alive here until whoever was first has said so.
        executor.shutdown(cancel_futures=True)
        raise
    executor.shutdown()


@contextmanager
def _ctrl_c_kept_from_children() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; ours inherit that they do not see it.

    This process sees it when the block ends. Windows has no such masks; there `_prepare` is all.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------- inside the processes


def _prepare(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    """A parent that was killed ends nobody; the processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _end(*_: object) -> None:
    """SIGTERM as an exception, so that a file which is half written is removed."""
    raise SystemExit(1)


def _work(work: Callable[[Item], Result], item: Item) -> Result:
    # Only in here: elsewhere in the process the executor would catch the exception, and go on.
    try:
        signal.signal(signal.SIGTERM, _end)
        return work(item)
    except SystemExit:
        os._exit(1)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
