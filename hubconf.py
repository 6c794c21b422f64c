"""Entry points for `torch.hub`: a model from a clone, without installing it.

model = torch.hub.load("path/to/clone", "tiny", source="local")
"""

from cmamba_ref import CMamba as _CMamba
from cmamba_ref.config import CONFIGS as _CONFIGS

dependencies = ["torch", "numpy", "einops", "safetensors"]


def tiny(pretrained: bool = True) -> _CMamba:
    """`tiny`, all qualities in one model, in eval mode; with the bundled weights by default."""
    return _CMamba.from_pretrained("tiny") if pretrained else _CMamba(_CONFIGS["tiny"]).eval()


def tiny_msssim() -> _CMamba:
    """`tiny` with the bundled weights that are trained for MS-SSIM, in eval mode."""
    return _CMamba.from_pretrained("tiny-msssim")


def small() -> _CMamba:
    """`small` with random weights, in eval mode."""
    return _CMamba(_CONFIGS["small"]).eval()


def base() -> _CMamba:
    """`base`, of the paper's published size, with random weights, in eval mode."""
    return _CMamba(_CONFIGS["base"]).eval()
