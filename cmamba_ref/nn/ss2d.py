"""SS2D: the projections, convolution and gate around the four-direction selective scan (VMamba)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.nn.float64_layers import DepthwiseConv3x3
from cmamba_ref.ops import selective_scan_2d

DIRECTIONS = 4
# Range of the initial step sizes dt, as in Mamba (Gu & Dao 2023).
DT_MIN, DT_MAX = 1e-3, 1e-1

# VMamba's names of tensors that have another name here.
VMAMBA_NAMES = {
    "conv2d.weight": "conv.weight",
    "conv2d.bias": "conv.bias",
    "x_proj_weight": "x_proj.weight",
    "dt_projs_weight": "dt_weight",
    "dt_projs_bias": "dt_bias",
    "A_logs": "A_log",
    "Ds": "D",
    "out_norm.weight": "norm.weight",
    "out_norm.bias": "norm.bias",
}


class SS2D(nn.Module):
    """2-D selective scan with input projection, depthwise convolution and gate.

    `in_proj -> (x, z)`, `x = SiLU(conv3x3(x))`, four-direction scan of x, LayerNorm, times
    `SiLU(z)`, `out_proj`.  The projections of the scan are pointwise, so they commute with every
    order of traversal and are computed once, in raster order.  In shapes, D is the number of inner
    channels, N of states and R the rank of dt; the parameter `D` is the weight of the skip.

    Args:
        channels: input and output channels C.
        d_state: states N per inner channel and direction.
        ssm_ratio: inner channels D = round(ssm_ratio * C), at least 1.

    Raises:
        InvalidArgumentError: no inner channel is left.
    """

    def __init__(self, channels: int, *, d_state: int = 16, ssm_ratio: float = 2.0) -> None:
        super().__init__()
        inner = round(ssm_ratio * channels)
        if inner < 1:
            raise InvalidArgumentError(
                f"`ssm_ratio` must give at least one inner channel, got {ssm_ratio} of {channels}; "
                "the paper's peers use 2"
            )
        dt_rank = math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = DepthwiseConv3x3(inner)
        self.x_proj = nn.Linear(inner, DIRECTIONS * (dt_rank + 2 * d_state), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_log = nn.Parameter(torch.empty(DIRECTIONS, inner, d_state))
        self.D = nn.Parameter(torch.ones(DIRECTIONS, inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Mamba's initialisation: A = -1...-N, dt log-uniform in [DT_MIN, DT_MAX]."""
        if self.A_log.is_meta:
            return  # no values to set, and trying to would import much of torch
        d_state, dt_rank = self.A_log.shape[-1], self.dt_weight.shape[-1]
        self.A_log.copy_(torch.arange(1, d_state + 1).log().expand_as(self.A_log))
        nn.init.uniform_(self.dt_weight, -(dt_rank**-0.5), dt_rank**-0.5)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) == dt

    def load_vmamba(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of an SS2D of VMamba (Liu et al. 2024), forms "v0" and "v2".

        Its directions come in our order; its names, and what they are here:

            in_proj.weight    [2 D, C]        in_proj.weight
            conv2d.*          [D, 1, 3, 3]    conv.*
            x_proj_weight     [4, R + 2 N, D] x_proj.weight, directions joined
            dt_projs_weight   [4, D, R]       dt_weight
            dt_projs_bias     [4, D]          dt_bias
            A_logs            [4 D, N]        A_log
            Ds                [4 D]           D
            out_norm.*        [D]             norm.*
            out_proj.weight   [C, D]          out_proj.weight

        Linear layers may be stored as 1x1 convolutions, as its channel-first models do.

        Args:
            state: the tensors of one SS2D, by these names without a prefix.

        Raises:
            InvalidArgumentError: a tensor is missing, too many or of another size; a form without
                gate ("noz") or without convolution has no counterpart here.
        """
        ours = self.state_dict()
        renamed = {VMAMBA_NAMES.get(name, name): tensor for name, tensor in state.items()}
        wrong = renamed.keys() ^ ours.keys()
        wrong |= {
            name for name in renamed.keys() - wrong if renamed[name].numel() != ours[name].numel()
        }
        if wrong:
            raise InvalidArgumentError(
                f"`state` must hold the weights of an SS2D of these sizes, got others for "
                f"{sorted(wrong)}; see SS2D.load_vmamba"
            )
        self.load_state_dict({n: tensor.reshape(ours[n].shape) for n, tensor in renamed.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Map features `[B, H, W, C]` to features `[B, H, W, C]` of the same dtype."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # each [B, H, W, D]
        u = self.convolve(u)
        # Per position and direction k: dt before its projection [R], B [N] and C [N].
        proj = rearrange(self.x_proj(u), "b h w (k f) -> b h w k f", k=DIRECTIONS)
        A, dt_weight, dt_bias, D = self.scan_parameters(u.dtype)
        return self.output(selective_scan_2d(u, proj, A, dt_weight, dt_bias, D), z)

    def convolve(self, x: Tensor) -> Tensor:
        """Depthwise 3x3 convolution and SiLU: `[B, H, W, D]` to `[B, H, W, D]`."""
        x = self.conv(rearrange(x, "b h w d -> b d h w"))
        return F.silu(rearrange(x, "b d h w -> b h w d"))

    def scan_parameters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A, dt_weight, dt_bias and D for a scan of a map of this type.

        The scan takes them in float32 at least, also where the model was cast to less.
        """
        wide = torch.promote_types(dtype, torch.float32)
        A_log, dt_weight, dt_bias, D = (
            parameter.to(wide) for parameter in (self.A_log, self.dt_weight, self.dt_bias, self.D)
        )
        return -A_log.exp(), dt_weight, dt_bias, D

    def output(self, y: Tensor, z: Tensor) -> Tensor:
        """Normalise y, gate it with z, both `[B, H, W, D]`, and project to `[B, H, W, C]`."""
        return self.out_proj(self.norm(y) * F.silu(z))
