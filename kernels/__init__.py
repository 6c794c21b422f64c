"""Triton kernels, imported as `cmamba_ref.kernels`; they need only torch and triton.

The directory lies at the top of the repository and is installed inside the package; no top-level
module `kernels` is ever installed. Importing this package does not import triton. Modules in here
import each other relatively.
"""


def unavailable_reason(device_type: str) -> str | None:
    """Why no kernel can run on this kind of device, or None when they can."""
    return "the Triton kernels are not part of this version yet"
