"""The process in which `tools/fuzz.py` tries its inputs: limited, watched, and traced.

    worker = Worker()
    trial = worker.run("container", data)

A trial that crashes its process, or does not end, costs the process and nothing else; the next one
gets a new process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import hashlib
import inspect
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from fuzz_targets import TARGETS

import cmamba_ref

PACKAGE = Path(cmamba_ref.__file__).parent
# What reads bytes from elsewhere; of these modules the lines are counted.
WATCHED = (
    "codec/container.py", "codec/image_codec.py", "codec/images.py", "config.py", "model.py",
    "model_id.py", "pillow_plugin.py", "weights.py", "entropy/gaussian.py",
    "entropy/latent_coder.py", "entropy/latent_prefix.py", "entropy/rans.py",
    "entropy/stored_tables.py", "entropy/tables.py",
)  # fmt: skip

MEMORY_LIMIT = 1 << 30
"""Bytes of address space that a trial may take beyond what the process had before."""
SECONDS_LIMIT = 5
"""Of processor time; a longer trial is a finding, and is ended after four times as long."""
DEADLINE = 600.0
"""Of wall-clock time, for a trial that waits for something; other work on the machine counts."""
REASON_LENGTH = 90

Line = tuple[str, int]


@dataclass
class Trial:
    """What came of one input.

    Attributes:
        outcome: `picture` and the like, or type and template of the error.
        finding: what is wrong, with a traceback if there is one; empty where all is well.
        lines: executed lines of the watched modules that this target had not reached before.
        seconds: of processor time; by the clock where the process did not live to tell.
        memory: bytes by which the process grew at the most.
    """

    outcome: str
    finding: str = ""
    lines: set[Line] = field(default_factory=set)
    seconds: float = 0.0
    memory: int = 0


class Worker:
    """Runs trials one by one, each in the process of the last one if that is still there."""

    def __init__(self, deadline: float = DEADLINE) -> None:
        self.seen: dict[str, set[Line]] = {name: set() for name in TARGETS}
        self.deadline = deadline
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        # Where the process writes how it ends, if it does not end as it should.
        self._last_words = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the worker

    def run(self, target: str, data: bytes) -> Trial:
        """Try one input."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._connection is not None  # for the type checker
        self._connection.send((target, data))
        start = time.monotonic()
        try:
            if self._connection.poll(self.deadline):
                trial = self._connection.recv()
                self.seen[target] |= trial.lines
                return trial
            finding = f"no end within {self.deadline} s"
            self._process.terminate()  # gently, so that it writes where it is
            self._process.join(10)
        except EOFError:
            self._process.join()
            code = self._process.exitcode or 0
            ended_by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            finding = f"the process died with {ended_by}"
        self.stop()
        self._last_words.seek(0)
        where = self._last_words.read().decode(errors="replace")
        seconds = time.monotonic() - start
        return Trial(outcome=finding, finding=f"{finding}\n{where}", seconds=seconds)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # torch is not imported anew
        here, there = context.Pipe()
        self._last_words.seek(0)
        self._last_words.truncate()
        process = context.Process(
            target=_serve, args=(there, self.seen, self._last_words.fileno()), daemon=True
        )
        process.start()
        self._process, self._connection = process, here
        there.close()


def _serve(connection: Connection, seen: dict[str, set[Line]], last_words: int) -> None:
    """The loop of the process; a crash, or too long a trial, leaves a traceback in `last_words`."""
    faulthandler.enable(last_words)
    for ending in (signal.SIGPROF, signal.SIGTERM):
        faulthandler.register(ending, last_words, chain=True)
    gc.freeze()
    limit = _status("VmSize") + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for count in range(sys.maxsize):
        try:
            target, data = connection.recv()
        except EOFError:
            return
        connection.send(_try(target, data, seen[target]))
        if count % 50 == 0:
            gc.collect()  # models are cycles


def _try(target: str, data: bytes, seen: set[Line]) -> Trial:
    trial = Trial(outcome="")
    # A timer for each trial, and no limit for the process: both count by the kernel's ticks, which
    # drift away from `process_time`, so that a limit in its terms ends trials that have hardly
    # begun once the process is old.
    signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS_LIMIT)
    _reset_peak()
    before, start = _status("VmRSS"), time.process_time()
    with _traced() as lines:
        try:
            trial.outcome = template(TARGETS[target].use(data))
        except TARGETS[target].errors as error:
            trial.outcome = template(f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001  # any other is what this is about
            trial.outcome = template(f"{type(error).__name__}: {error}")
            trial.finding = traceback.format_exc()
    signal.setitimer(signal.ITIMER_PROF, 0)
    trial.seconds = time.process_time() - start
    trial.memory = max(_status("VmHWM") - before, 0)
    if trial.seconds > SECONDS_LIMIT and not trial.finding:
        trial.finding = f"took {trial.seconds:.1f} s of processor time"
    trial.lines = lines - seen
    seen |= lines
    return trial


@contextlib.contextmanager
def _traced() -> Iterator[set[Line]]:
    """Collects the executed lines of the watched modules."""
    lines: set[Line] = set()
    watched = {str(PACKAGE / name): name for name in WATCHED}

    def of_line(frame: types.FrameType, event: str, _: object):
        if event == "line":
            lines.add((watched[frame.f_code.co_filename], frame.f_lineno))
        return of_line

    def of_call(frame: types.FrameType, event: str, _: object):
        return of_line if frame.f_code.co_filename in watched else None

    sys.settrace(of_call)
    try:
        yield lines
    finally:
        sys.settrace(None)


@functools.cache
def executable_lines() -> dict[str, set[int]]:
    """The lines inside functions, by watched module: what tracing can reach."""

    def of_code(code: types.CodeType) -> Iterator[int]:
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                # A class body runs at import, its methods later.
                if inner.co_flags & inspect.CO_OPTIMIZED:
                    first = inner.co_firstlineno
                    yield from (n for _, _, n in inner.co_lines() if n is not None and n != first)
                yield from of_code(inner)

    found = {}
    for name in WATCHED:
        path = PACKAGE / name
        found[name] = set(of_code(compile(path.read_text(), str(path), "exec")))
    return found


@functools.cache
def sources() -> str:
    """A fingerprint of the watched modules: line numbers of others mean other lines."""
    digest = hashlib.sha256()
    for name in WATCHED:
        digest.update((PACKAGE / name).read_bytes())
    return digest.hexdigest()[:16]


def template(text: str) -> str:
    """A message without what differs from input to input, so that equal reasons are counted."""
    text = re.sub(r"""'[^']*'|"[^"]*"|\[[^\]]*\]""", "…", text)
    words = [
        w if re.fullmatch(r"[`(]*[A-Za-z][A-Za-z-]*[`);:,.]*", w) else "…" for w in text.split()
    ]
    return re.sub(r"(… )+", "… ", " ".join(words))[:REASON_LENGTH].strip()


def _status(name: str) -> int:
    """One of the kernel's counters of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def _reset_peak() -> None:
    """Let the kernel measure the peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def set_up() -> None:
    """What every process needs, done once before the first one is forked."""
    torch.set_num_threads(1)  # a process with other threads must not fork
    torch.zeros(1)
    executable_lines()  # of the sources as they are imported
    sources()
    for target in TARGETS.values():
        target.seeds()
