"""The command `cmamba`, with its moments: what starting up, loading and coding take of its time.

    python tools/timed_cli.py encode photo.png -o photo.cmb

The last line on stdout is a JSON object of times in seconds on the clock `time.monotonic`, which on
Linux all processes share: `started` (the first line of this file), `imported`, one for every stage
that the command shows while it works, and `done`.
"""

import time

MOMENTS = {"started": time.monotonic()}

# Above: the imports are part of what is measured.
import contextlib  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

# The commands import these when they need them, in the middle of reading; here they come before, so
# that reading is only that.
import cmamba_ref  # noqa: E402, F401
from cmamba_ref import metrics  # noqa: E402, F401
from cmamba_ref.codec import image_codec, images  # noqa: E402, F401

# The module; `cmamba_ref.cli.main` as an attribute is its function of that name.
cli: Any = importlib.import_module("cmamba_ref.cli.main")

MOMENTS["imported"] = time.monotonic()


@contextlib.contextmanager
def noted_stages(count: int) -> Iterator[Callable[[str], None]]:
    """In the place of the command's own display of stages."""

    def begin(stage: str) -> None:
        MOMENTS[stage] = time.monotonic()

    yield begin


def main(argv: list[str] | None = None) -> int:
    cli._stages = noted_stages
    status = cli.main(argv)
    MOMENTS["done"] = time.monotonic()
    print(json.dumps(MOMENTS))
    return status


if __name__ == "__main__":
    code = main()
    gc.freeze()  # as `cli.run` does
    sys.exit(code)
