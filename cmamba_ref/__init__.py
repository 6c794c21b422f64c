"""CMamba: a readable reference of the CMamba learned image codec, and a codec to use.

A picture is a uint8 array `[H, W, 3]`, a file is bytes:

    model = cmamba_ref.CMamba.from_pretrained("tiny")
    data = cmamba_ref.encode(model, picture, quality=4)
    picture = cmamba_ref.decode(data, model)
"""

from cmamba_ref.codec import decode, encode
from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import (
    BackendUnavailableError,
    BitstreamError,
    CMambaError,
    ImageError,
    InvalidArgumentError,
    WeightsError,
)
from cmamba_ref.model import CMamba
from cmamba_ref.ops import (
    available_backends,
    scan_backend,
    selective_scan,
    selective_scan_2d,
    set_default_backend,
)

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BitstreamError",
    "CMamba",
    "CMambaConfig",
    "CMambaError",
    "ImageError",
    "InvalidArgumentError",
    "WeightsError",
    "available_backends",
    "decode",
    "encode",
    "scan_backend",
    "selective_scan",
    "selective_scan_2d",
    "set_default_backend",
]
