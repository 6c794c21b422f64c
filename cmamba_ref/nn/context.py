"""The context model: CAE and latent residual prediction, slice by slice.

y is coded in groups of channels (slices).  For slice i, with everything decoded so far,

    t      = w_sq([Phi', y_bar_<i])          # squeeze
    F_ssm  = SS2D(LN(t)) + t                 # all of space in one pass
    Phi_i  = w_ffn(LN(F_ssm)) + F_ssm        # -> mean and log-scale of every element of the slice
    y_bar_i = y_hat_i + LRP([Phi'_mean, y_bar_<i, y_hat_i])  # latent residual prediction

One loop (`ContextModel.forward`) serves training, compression and decompression; what differs is
only `code_slice`, which is called once the distribution of a slice is known.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy.precision import StoredPrecision
from cmamba_ref.nn.ablations import Hyperprior
from cmamba_ref.nn.float64_layers import Conv3x3
from cmamba_ref.nn.ss2d import SS2D

# (slice number, means, log-scales) -> y_hat of the slice, all `[B, slice's width, h, w]`
CodeSlice = Callable[[int, Tensor, Tensor], Tensor]


class CAE(nn.Module):
    """Context-aware entropy model of one slice: context to means and log-scales.

    Deviation from the paper: its equation ends at Phi_i, which ties the width to twice the slice's
    channels.  We widen to `cae_width` and add a linear head; `cae_width=None` is the literal form.
    """

    def __init__(self, config: CMambaConfig, context_channels: int, slice_width: int) -> None:
        super().__init__()
        out_channels = 2 * slice_width
        width = out_channels if config.cae_width is None else config.cae_width
        self.w_sq = nn.Linear(context_channels, width)
        self.ss2d = None
        if config.context == "cae":
            self.norm1 = nn.LayerNorm(width)
            self.ss2d = SS2D(width, d_state=config.d_state, ssm_ratio=config.ssm_ratio)
        self.norm2 = nn.LayerNorm(width)
        self.w_ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        literal = config.cae_width is None
        self.head = nn.Identity() if literal else nn.Linear(width, out_channels)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[B, context_channels, h, w]` to means, log-scales: each `[B, slice_width, h, w]`."""
        t = self.w_sq(rearrange(context, "b c h w -> b h w c"))  # [B, h, w, width], as all below
        f_ssm = t if self.ss2d is None else self.ss2d(self.norm1(t)) + t
        phi = self.w_ffn(self.norm2(f_ssm)) + f_ssm
        means, log_scales = rearrange(self.head(phi), "b h w (two c) -> two b c h w", two=2)
        return means, log_scales


class LRP(nn.Module):
    """Latent residual prediction (Minnen & Singh 2020): `y - y_hat`, estimated, in (-0.5, 0.5)."""

    def __init__(self, config: CMambaConfig, context_channels: int, slice_width: int) -> None:
        super().__init__()
        hidden1, hidden2 = config.lrp_widths
        self.layers = nn.Sequential(
            Conv3x3(context_channels, hidden1),
            nn.GELU(),
            Conv3x3(hidden1, hidden2),
            nn.GELU(),
            Conv3x3(hidden2, slice_width),
        )

    def forward(self, context: Tensor) -> Tensor:
        """Map `[B, context_channels, h, w]` to a residual `[B, slice_width, h, w]`."""
        return 0.5 * torch.tanh(self.layers(context))


class ContextModel(StoredPrecision):
    """The loop over all slices: Phi' to y_bar; `code_slice` quantises, encodes or decodes one."""

    def __init__(self, config: CMambaConfig) -> None:
        super().__init__()
        m, widths = config.latent_channels, config.slice_widths
        ends = list(accumulate(widths))  # channels of y up to and with each slice
        self.cae = nn.ModuleList(
            Hyperprior(config, end - width, width)
            if config.context == "none"
            else CAE(config, 2 * m + end - width, width)  # reads Phi' and all slices before
            for end, width in zip(ends, widths, strict=True)
        )
        self.lrp = None
        if config.lrp:
            self.lrp = nn.ModuleList(
                LRP(config, m + end, width)  # reads Phi'_mean, all slices before and y_hat
                for end, width in zip(ends, widths, strict=True)
            )

    def forward(self, phi: tuple[Tensor, Tensor], code_slice: CodeSlice) -> Tensor:
        """Code every slice in turn and return y_bar `[B, M, h, w]`.

        Args:
            phi: the two halves of Phi' from h_s, each `[B, M, h, w]`.
            code_slice: called once per slice with its number, means and log-scales; returns y_hat
                of that slice.  Training quantises there, the encoder quantises and records the
                symbols, the decoder reads the symbols.
        """
        phi_mean, phi_scale = phi
        y_bar: list[Tensor] = []
        for i, cae in enumerate(self.cae):
            means, log_scales = cae(torch.cat([phi_mean, phi_scale, *y_bar], dim=1))
            y_hat = code_slice(i, means, log_scales)
            if self.lrp is None:
                y_bar.append(y_hat)
            else:
                y_bar.append(y_hat + self.lrp[i](torch.cat([phi_mean, *y_bar, y_hat], dim=1)))
        return torch.cat(y_bar, dim=1)
