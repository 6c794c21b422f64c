"""Work for `cmamba_ref.cli.process_pool`; a fresh process imports this module without torch."""

import os
import signal


def prepare() -> None:
    pass


def work(item: str) -> str:
    """An item in capitals; `kill` ends its process the way a system short of memory would."""
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "raise":
        raise ValueError(item)
    return item.upper()
