"""CMamba: a readable reference of the CMamba learned image codec, and a codec to use.

An image is a uint8 array `[H, W, 3]`, a file is bytes:

    model = cmamba_ref.CMamba.from_pretrained("tiny")
    data = cmamba_ref.encode(image, model, quality=4)
    image = cmamba_ref.decode(data, model)

What needs torch is imported when it is first asked for: torch takes a second, and `cmamba --help`,
`cmamba info` and a process that only hands out work to others do without it.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import (
    BackendUnavailableError,
    BitstreamError,
    CMambaError,
    ImageError,
    ImageWarning,
    InvalidArgumentError,
    MemoryLimitError,
    WeightsError,
)

if TYPE_CHECKING:
    from cmamba_ref.codec import decode, encode
    from cmamba_ref.codec.files import decode_file, encode_file
    from cmamba_ref.model import CMamba
    from cmamba_ref.nn.blocks import CASSM, VSSBlock
    from cmamba_ref.nn.context import CAE, LRP, ContextModel
    from cmamba_ref.nn.ss2d import SS2D
    from cmamba_ref.ops import (
        available_backends,
        scan_backend,
        selective_scan,
        selective_scan_2d,
        set_default_backend,
    )

__version__ = "0.2.0"

# An installation holds `kernels`; in a checkout it lies beside this package.
_package = Path(__file__).parent
if not (_package / "kernels").is_dir() and (_package.parent / "kernels" / "tiling.py").is_file():
    __path__.append(str(_package.parent))

__all__ = [
    "CAE",
    "CASSM",
    "LRP",
    "SS2D",
    "BackendUnavailableError",
    "BitstreamError",
    "CMamba",
    "CMambaConfig",
    "CMambaError",
    "ContextModel",
    "ImageError",
    "ImageWarning",
    "InvalidArgumentError",
    "MemoryLimitError",
    "VSSBlock",
    "WeightsError",
    "available_backends",
    "decode",
    "decode_file",
    "encode",
    "encode_file",
    "scan_backend",
    "selective_scan",
    "selective_scan_2d",
    "set_default_backend",
]

# Where the names above that need torch come from.
_LAZY = {
    "CAE": "nn.context",
    "CASSM": "nn.blocks",
    "CMamba": "model",
    "ContextModel": "nn.context",
    "LRP": "nn.context",
    "SS2D": "nn.ss2d",
    "VSSBlock": "nn.blocks",
    "available_backends": "ops",
    "decode": "codec",
    "decode_file": "codec.files",
    "encode": "codec",
    "encode_file": "codec.files",
    "scan_backend": "ops",
    "selective_scan": "ops",
    "selective_scan_2d": "ops",
    "set_default_backend": "ops",
}

# Hidden from type checkers, to which it would say that there is an attribute of every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what has not been imported yet: a name in `_LAZY`, or a submodule (PEP 562)."""
        if name in _LAZY:
            value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
