"""What numbers were measured with: for the JSON of the commands that measure."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Results and pages about them: what they hold has no part in what is measured next.
NOT_MEASURED_WITH = ("benchmarks", "*.md")


def of_run(tool: str, arguments: list[str]) -> dict[str, object]:
    """Command, commit, date, machine and threads of this run of a tool in this folder.

    Paths in the command say nothing of this machine, see `portable`.
    """
    return {
        "command": " ".join(["python", f"tools/{tool}", *map(portable, arguments)]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {processor()}",
        "threads": torch.get_num_threads(),
    }


def in_words(made: dict[str, Any]) -> str:
    """What `of_run` gives, with `versions`, as a sentence for a page."""
    return (
        f"`{made['command']}`, commit {made['commit']}, {made['date']}; {made['machine']}, "
        f"{made['threads']} threads, torch {made['versions']['torch']}."
    )


def portable(argument: str) -> str:
    """An argument without the folders of this machine.

    A path below this clone is given from its root, another one that is absolute or leads upwards by
    its last part: that is what anyone has to replace by their own.  NAME=PATH keeps its name, and
    FILE:NAME what stands behind the file.
    """
    name, equals, rest = argument.rpartition("=")
    file, colon, curve = rest.partition(":") if not Path(rest).drive else (rest, "", "")
    given = Path(file)
    if not given.is_absolute() and ".." not in given.parts:
        return argument
    # Not resolved: a link in this clone is known by its name here.
    whole = Path(os.path.normpath(Path.cwd() / given))
    inside = whole.is_relative_to(ROOT)
    file = whole.relative_to(ROOT).as_posix() if inside else whole.name
    return f"{name}{equals}{file}{colon}{curve}"


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of this clone, with "-dirty" after it where files were changed.

    Changed results and pages do not count: of several measurements, each writes some, and the next
    one is made with the same code.
    """
    others = [f":(exclude){pattern}" for pattern in NOT_MEASURED_WITH]
    try:
        name = _git("describe", "--always")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def processor() -> str:
    """Number and name of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "unknown processor"
