"""What numbers were measured with: for the JSON of the commands that measure."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def of_run(tool: str, arguments: list[str]) -> dict[str, object]:
    """Command, commit, date, machine and threads of this run of a tool in this folder."""
    return {
        "command": " ".join(["python", f"tools/{tool}", *arguments]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {processor()}",
        "threads": torch.get_num_threads(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of this clone, with "-dirty" after it where files were changed."""
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """Number and name of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "unknown processor"
