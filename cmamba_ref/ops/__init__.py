"""Selective scans: the 1-D scan of Mamba and the four-direction scan of a map.

`selective_scan` takes what `mamba_ssm`'s `selective_scan_fn` takes and returns what it returns;
`selective_scan_2d` adds the four directions of SS2D in one call. Both run on any registered
backend: `reference` (the literal recurrence), `chunked` (fast eager PyTorch), `triton`, and those
that `register_backend` adds.
"""

from cmamba_ref.ops.api import selective_scan, selective_scan_2d
from cmamba_ref.ops.dispatch import (
    Backend,
    available_backends,
    get_default_backend,
    register_backend,
    scan_backend,
    set_default_backend,
)
from cmamba_ref.ops.validation import Scan2dInputs, ScanInputs

__all__ = [
    "Backend",
    "Scan2dInputs",
    "ScanInputs",
    "available_backends",
    "get_default_backend",
    "register_backend",
    "scan_backend",
    "selective_scan",
    "selective_scan_2d",
    "set_default_backend",
]
