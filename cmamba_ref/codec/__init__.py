"""The codec: image files, `.cmb` bytes and their container, memory limits, verification.

The names of `image_codec` need torch, which is imported when one of them is first asked for.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmamba_ref.codec.image_codec import (
        DEFAULT_MAX_PIXELS,
        DEFAULT_MODEL,
        check_symbols,
        decode,
        decode_container,
        default_model,
        encode,
        is_model,
        loaded_or_given,
        model_for,
    )

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "DEFAULT_MODEL",
    "check_symbols",
    "decode",
    "decode_container",
    "default_model",
    "encode",
    "is_model",
    "loaded_or_given",
    "model_for",
]

# Hidden from type checkers, to which it would say that there is an attribute of every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(importlib.import_module("cmamba_ref.codec.image_codec"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
