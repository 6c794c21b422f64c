"""Standard input and output in place of files, where the command line says `-`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cmamba_ref.errors import UsageError, printable

STREAM = Path("-")


def parse_path(text: str) -> Path:
    """Parse a path as typed; `./-` stays the file of that name, which `Path` would take for `-`.

    Raises:
        ArgumentTypeError: it is empty, as an unset variable; `Path` would take it for the folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    path = Path(text)
    return path.absolute() if path == STREAM and text != "-" else path


def checked_output(text: str) -> str:
    """Return the text of `-o`, of which a slash at the end counts.

    Raises:
        ArgumentTypeError: as `parse_path`.
    """
    parse_path(text)
    return text


def label(path: Path, stream: str) -> str:
    """Return the display name: the path, or "standard input" or "standard output" for `-`."""
    return f"standard {stream}" if path == STREAM else printable(path)


def check_alone(inputs: Sequence[Path], output: Path | None = None) -> None:
    """Refuse `-` where several inputs are worked on by several processes.

    Raises:
        UsageError: it is among the inputs, or the output.
    """
    for name, paths in (("IN", inputs), ("-o", [output])):
        if STREAM in paths:
            raise UsageError(
                f"`{name}` must be files and folders for several inputs and for verify, got -; "
                "encode and decode take - for one input or output"
            )


def read_input(path: Path) -> bytes:
    """Return a file's bytes; for `-`, all of standard input.

    Raises:
        UsageError: standard input is a terminal.
        OSError: the file cannot be read.
    """
    if path != STREAM:
        return path.read_bytes()
    if sys.stdin.isatty():
        raise UsageError(
            "`IN` must be data from a file or a program where it is -, got a terminal; "
            "redirect it, as in < photo.jpg, or name a file"
        )
    with _named("standard input"):
        return sys.stdin.buffer.read()


def check_output() -> None:
    """Refuse to send a file's bytes to a terminal, before the work that makes them.

    Raises:
        UsageError: standard output is one.
    """
    if sys.stdout.isatty():
        raise UsageError(
            "`-o` must not be a terminal, which cannot show binary data, got -; "
            "redirect it, as in > photo.cmb, or name a file with -o"
        )


def write_output(data: bytes) -> None:
    """Send bytes, and nothing else, to standard output.

    Raises:
        OSError: nobody reads any more, or there is no room where it goes.
    """
    with _named("standard output"):
        sys.stdout.buffer.write(data)
    flush_output()


def flush_output() -> None:
    """Send what is left in the buffer of standard output.

    Raises:
        OSError: as `write_output`.
    """
    try:
        with _named("standard output"):
            sys.stdout.flush()
    except OSError:
        # What is left in the buffer would fail once more at the end of the process, with lines of
        # Python's own and another exit code.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


def open_closed_streams() -> None:
    """Open standard streams that whoever started this process has closed.

    Otherwise a file of ours would get the number of one, and all that is printed there. What goes
    to stderr is lost; reading stdin and writing stdout fail, since they are opened the wrong way.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            # A write, of nothing: a wrapper in shell, such as pyenv's, may itself have got the
            # number, open for reading.
            os.write(number, b"") if number else os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue
            nowhere = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


@contextmanager
def _named(stream: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, stream) from error
