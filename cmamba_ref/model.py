"""CMamba: the whole model, with CompressAI's protocol.

    y = g_a(x)            z = h_a(y)            z_hat = Q(z)        Phi' = h_s(z_hat)
    y_hat, y_bar  slice by slice from Phi' (cmamba_ref.nn.context)     x_hat = g_s(y_bar)

Names are the field's: `g_a g_s h_a h_s y y_hat y_bar z z_hat x_hat`, as in the paper.
"""

from __future__ import annotations

import numbers
import os
import textwrap
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref import weights
from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.entropy.bounds import ste_round
from cmamba_ref.entropy.dead_zone import dead_zone_slope, is_zeroed
from cmamba_ref.entropy.factorized import FactorizedPrior
from cmamba_ref.entropy.gaussian import GaussianConditional
from cmamba_ref.entropy.latent_coder import (
    MULTIPLE,
    NOT_FINITE_STRING,
    SKIPPED_TABLES,
    Y_PER_Z,
    CompressOutput,
    Float64Path,
    LatentCoder,
    LatentSymbols,
    check_finite,
    hyper_latent_shape,
)
from cmamba_ref.entropy.latent_prefix import QUALITY_UNITS
from cmamba_ref.errors import BitstreamError, InvalidArgumentError
from cmamba_ref.model_id import fingerprint
from cmamba_ref.nn import tiled
from cmamba_ref.nn.bypass import LinearBypass
from cmamba_ref.nn.context import ContextModel
from cmamba_ref.nn.gain import Gains, GainUnits
from cmamba_ref.nn.transforms import Analysis, HyperAnalysis, HyperSynthesis, Synthesis
from cmamba_ref.ops.autocast import without_autocast

# Used where no quality is given, or the model's best if that is lower.
DEFAULT_QUALITY = 4.0
# Far above 0...1 with noise; below only the darkest images in 0...255.
LARGEST_VALUE = 8


class ForwardOutput(TypedDict):
    """`x_hat` `[B, 3, H, W]`; likelihoods of y and z of the padded image."""

    x_hat: Tensor
    likelihoods: dict[str, Tensor]


class CMamba(nn.Module):
    """The CMamba codec (Wu et al. 2025, arXiv 2502.04988), with totals derived from the paper.

    Args:
        config: a `CMambaConfig` or the name of one: "base", "small", "tiny".
    """

    def __init__(self, config: CMambaConfig | str = "base") -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in CONFIGS:
                raise InvalidArgumentError(
                    f"`config` must be one of {sorted(CONFIGS)} or a CMambaConfig, got {config!r}"
                )
            config = CONFIGS[config]
        self.config = config
        self.g_a = Analysis(config)
        self.g_s = Synthesis(config)
        self.h_a = HyperAnalysis(config)
        self.h_s = HyperSynthesis(config)
        self.context = ContextModel(config)
        self.entropy_bottleneck = FactorizedPrior(config.hyper_widths[-1])
        self.gaussian_conditional = GaussianConditional()
        self.gain = GainUnits(config) if config.variable_rate else None
        self.bypass = LinearBypass(config.latent_channels) if config.bypass else None
        self._float64_path = Float64Path()
        self._known_id: tuple[object, bytes] | None = None

    # ---------------------------------------------------------------- training and estimation

    def forward(
        self,
        x: Tensor,
        quality: Tensor | float | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> ForwardOutput:
        """Reconstruct images and compute the likelihoods of their latents.

        In training mode the rate is that of latents with uniform noise, and quantisation is
        straight-through everywhere else; in eval mode latents are rounded for both, with the
        encoder's dead zone.

        Args:
            x: images `[B, 3, H, W]` in 0...1, any H, W >= 1; padded inside, see `pad`, to a
                multiple of 64 (likelihoods are those of the padded image).
            quality: for a variable-rate model, 1...Q, one number or one per image `[B]`; None for
                the default, 4.
            noise: for training mode, `y` and `z` as in `latent_shapes`, uniform in -0.5...0.5; None
                draws it from torch's generator.  A trainer that gives it decides which image sees
                which noise, whatever the images are batched with.

        Raises:
            InvalidArgumentError: wrong type, shape or quality, noise of another shape, or images in
                0...255 (on a GPU, only `compress` sees that).
        """
        _check_images(x)
        if noise is not None:
            self._check_noise(noise, x)
        height, width = x.shape[-2:]
        y, gains = self._analyse(pad(x), quality)
        z = self.h_a(y)
        with without_autocast(y.device):
            stored = next(self.h_s.parameters()).dtype
            y, z = y.to(stored), z.to(stored)
            medians = self.entropy_bottleneck.medians
            z_hat = ste_round(z - medians) + medians
            given = noise or {}
            z_seen = _noisy(z, given.get("z")) if self.training else z_hat
            z_likelihood = self.entropy_bottleneck.likelihood(z_seen)
            y_slices = y.split(self.config.slice_widths, dim=1)
            y_hats: list[Tensor] = []
            gaussians: list[tuple[Tensor, Tensor]] = []  # means and log-scales of each slice

            slope = None if self.training else self._dead_zone_slope(gains)

            def quantise(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
                residual = y_slices[i] - means
                y_hat = ste_round(residual) + means
                if not self.training:
                    zeroed = is_zeroed(residual, log_scales, SKIPPED_TABLES, slope)
                    y_hat = torch.where(zeroed, means, y_hat)
                y_hats.append(y_hat)
                gaussians.append((means, log_scales))
                return y_hat

            y_bar = self.context(self.h_s(z_hat), quantise)
            # Of all slices at once, which takes a GPU fewer launches.
            means, log_scales = (torch.cat(part, dim=1) for part in zip(*gaussians, strict=True))
            y_seen = _noisy(y, given.get("y")) if self.training else torch.cat(y_hats, dim=1)
            y_likelihood = self.gaussian_conditional.likelihood(y_seen, means, log_scales)
        x_hat = self._synthesise(y_bar, gains)
        return {
            "x_hat": x_hat[..., :height, :width],
            "likelihoods": {"y": y_likelihood, "z": z_likelihood},
        }

    def analyze(self, x: Tensor, quality: Tensor | float | None = None) -> Tensor:
        """Compute the scaled latent y of images: the tensor that the quantiser sees.

        Differentiable, as is `synthesize`; `synthesize(analyze(x, q), q)` is the reconstruction
        with the quantiser off, padded.  Our choice: y is taken after the gain of the quality.

        Args:
            x: images `[B, 3, H, W]` in 0...1, any H, W >= 1; padded inside, see `pad`, to a
                multiple of 64.
            quality: as in `forward`.

        Returns:
            `[B, M, h, w]`, the shape of y in `latent_shapes(H, W)`.

        Raises:
            InvalidArgumentError: wrong shape or quality.
        """
        _check_images(x)
        return self._analyse(pad(x), quality)[0]

    def synthesize(self, y: Tensor, quality: Tensor | float | None = None) -> Tensor:
        """Reconstruct images from the scaled latent: y, or y_bar as the codec has it.

        Args:
            y: `[B, M, h, w]`, of any floating-point type; any h, w >= 1.
            quality: the one that y was scaled for, as in `forward`.

        Returns:
            `[B, 3, 16 h, 16 w]`, not clipped to 0...1, so that gradients pass everywhere.

        Raises:
            InvalidArgumentError: wrong shape or quality.
        """
        channels = self.config.latent_channels
        if y.ndim != 4 or y.shape[1] != channels or 0 in y.shape or not y.is_floating_point():
            raise InvalidArgumentError(
                f"`y` must be a floating-point latent [B, {channels}, h, w], "
                f"got {y.dtype}{list(y.shape)}; see `analyze`"
            )
        return self._synthesise(y, self._gains(quality, y.shape[0]))

    def latent_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Return the shapes `[C, h, w]` of `y` and `z` of an image of `height` x `width` pixels."""
        rows, columns = hyper_latent_shape(height, width)
        return {
            "y": (self.config.latent_channels, Y_PER_Z * rows, Y_PER_Z * columns),
            "z": (self.config.hyper_widths[-1], rows, columns),
        }

    def aux_loss(self) -> Tensor:
        """Return the loss of the factorised prior's quantiles, for a separate optimiser."""
        return self.entropy_bottleneck.aux_loss()

    # ---------------------------------------------------------------- coding

    @property
    def latent_coder(self) -> LatentCoder:
        """The coder of this model's latents, on its present weights, tables and device."""
        return LatentCoder(
            self.config,
            self.h_s,
            self.context,
            self.entropy_bottleneck,
            self.gaussian_conditional,
            self._float64_path,
        )

    @torch.no_grad()
    def compress(self, x: Tensor, quality: float | None = None) -> CompressOutput:
        """Code images into strings.

        Args:
            x: images `[B, 3, H, W]` in 0...1, padded to a multiple of 64, see `pad`; what
                `decompress` returns has the padded size.
            quality: for a variable-rate model, 1...Q; None for the default, 4.

        Raises:
            InvalidArgumentError: wrong type, shape or quality, or images in 0...255.
            CMambaError: x, the weights or the latents hold NaN or infinity.
            WeightsError: the model has no entropy tables; call `update()`.
        """
        _check_images(x, look=True)
        quality, coder = self.check_quality(quality), self.latent_coder
        coder.tables()  # before the transforms: without tables there is nothing to code with
        return coder.encode(self.latent_symbols(x, quality), quality)

    @torch.no_grad()
    def latent_symbols(self, x: Tensor, quality: float | None = None) -> LatentSymbols:
        """Compute the integers that `compress` codes, see `LatentSymbols`.

        Args:
            x: images `[B, 3, H, W]` in 0...1, padded to a multiple of 64, see `pad`.
            quality: as in `compress`.

        Raises:
            InvalidArgumentError: wrong shape or quality.
            CMambaError: x, the weights or the latents hold NaN or infinity.
        """
        _check_images(x)
        y, gains = self._analyse(pad(x), self.check_quality(quality))
        return self.latent_coder.symbols(y, self.h_a(y), self._dead_zone_slope(gains))

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Decode strings into images.

        Args:
            strings: `[y strings, z strings]` as `compress` returned them.
            shape: of z, `(h, w)`.

        Returns:
            `x_hat`: `[B, 3, 64 h, 64 w]` in 0...1.

        Raises:
            BitstreamError: a string is damaged, or was made by another model.
        """
        y_bar, quality = self.decode_latent(strings, shape)
        return {"x_hat": self.reconstruct(y_bar, quality)}

    def decode_latent(
        self, strings: list[list[bytes]], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """The first half of `decompress`: strings to y_bar and qualities, see `LatentCoder`."""
        return self.latent_coder.decode(strings, shape)

    @torch.no_grad()
    def reconstruct(self, y_bar: Tensor, quality: Tensor | None) -> Tensor:
        """The second half of `decompress`: y_bar to images `[B, 3, 16 h, 16 w]` in 0...1.

        Raises:
            BitstreamError: the image is not finite.
        """
        x_hat = self.synthesize(y_bar, quality)
        check_finite(x_hat, BitstreamError, NOT_FINITE_STRING)
        return x_hat.clamp(0, 1)

    def check_quality(self, quality: float | None) -> float | None:
        """Return a quality as files store it, in steps of 0.01; None for a fixed-rate model.

        Args:
            quality: None for the default, 4.

        Raises:
            InvalidArgumentError: no number, out of range, or given to a fixed-rate model.
        """
        if self.gain is None:
            if quality is not None:
                raise InvalidArgumentError(
                    f"`quality` must be None, got {quality!r}; {self.config.name!r} has one rate"
                )
            return None
        top = len(self.config.lmbdas)
        if quality is None:
            return min(DEFAULT_QUALITY, top)
        is_number = isinstance(quality, numbers.Real) and not isinstance(quality, bool)
        if not is_number or not 1 <= quality <= top:  # also for NaN
            raise InvalidArgumentError(
                f"`quality` must be a number from 1 to {top}, got {quality!r}; "
                "1 gives the smallest files"
            )
        return round(float(quality) * QUALITY_UNITS) / QUALITY_UNITS

    # ---------------------------------------------------------------- weights and tables

    def update(self, force: bool = False) -> bool:
        """Make the integer entropy tables once after training; loaded tables are never altered.

        Args:
            force: make them again, after further training.  Files written before can then no longer
                be read with this model.

        Returns:
            whether tables were made.
        """
        return self.latent_coder.update(force)

    @property
    def model_id(self) -> bytes:
        """Eight bytes that name these weights and tables; files carry them.

        The id is that of the weights as loaded or trained: moving or casting the model, by `.to`,
        `.half` or `.bfloat16`, does not change it; casting a part of it by itself does.
        """
        key = fingerprint(self)
        if self._known_id is None or self._known_id[0] != key:
            self._known_id = (key, weights.content_id(self.state_dict()))
        return self._known_id[1]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights and tables as `nn.Module` does; those of the model in a `DataParallel` too.

        Args:
            state_dict: of this model, or of one that `nn.DataParallel` or DistributedDataParallel
                wraps, which puts `module.` before every name.
        """
        return super().load_state_dict(weights.without_wrapper(state_dict), strict, assign)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, device: str = "cpu") -> CMamba:
        """Load a model in eval mode, from the package or from what `save_pretrained` wrote.

        Args:
            source: the name of a bundled model, "tiny" or "tiny-msssim"; or a directory; or
                "user/repository" of the Hugging Face Hub, where there is no such directory
                (extra: hub).
            device: where the model shall be.

        Raises:
            InvalidArgumentError: PyTorch cannot use the device here.
            WeightsError: nothing there, damaged, or not to be downloaded.
        """
        _check_device(device)
        # In inference mode it would be a model that can never be trained, nor compute gradients.
        with torch.inference_mode(False):
            return weights.load(cls, source).to(device).eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json`, `model.safetensors` and its hash into `directory`."""
        weights.save(self, directory)

    # ---------------------------------------------------------------- inside

    def __getstate__(self) -> dict[str, Any]:
        known = self._known_id
        if known is not None:
            known = ((), known[1]) if known[0] == fingerprint(self) else None
        return {**self.__dict__, "_known_id": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is the same model in other memory; by its content, one that was cast would not be.
        super().__setstate__(state)
        if self._known_id is not None:
            self._known_id = (fingerprint(self), self._known_id[1])

    def _apply(self, fn, recurse: bool = True) -> CMamba:
        tables = self.gaussian_conditional.stored
        named = self.model_id if tables.filled and not tables.cdf.is_meta else None
        super()._apply(fn, recurse)
        if named is not None and not tables.cdf.is_meta:
            self._known_id = (fingerprint(self), named)
        return self

    def _device(self) -> torch.device:
        return next(self.g_a.parameters()).device

    def _analyse(self, x: Tensor, quality: Tensor | float | None) -> tuple[Tensor, Gains | None]:
        """Return the scaled latent y, and the gains for g_s."""
        first = next(self.g_a.parameters())
        x = x.to(first.device, first.dtype).contiguous(memory_format=torch.channels_last)
        gains = self._gains(quality, x.shape[0])
        y = self.g_a(x, tiled.apply)
        if self.bypass is not None:
            y = y + self.bypass.to_latent(x)
        return y if gains is None else y * gains.latent, gains

    def _gains(self, quality: Tensor | float | None, batch: int) -> Gains | None:
        """Return the gains of each image; None for a fixed-rate model."""
        if self.gain is None:
            self.check_quality(quality)  # type: ignore[arg-type]
            return None
        if isinstance(quality, Tensor):
            self._check_qualities(quality, batch)
        else:
            quality = torch.tensor(self.check_quality(quality), device="cpu")
        return self.gain(quality.float().to(self._device(), non_blocking=True).expand(batch))

    def _dead_zone_slope(self, gains: Gains | None) -> Tensor | None:
        """Return the slope of the encoder's dead zone `[B, 1, 1, 1]`; None for a fixed rate."""
        if self.gain is None or gains is None:
            return None
        return dead_zone_slope(self.gain.lmbda(gains.quality))[:, None, None, None]

    def _check_qualities(self, quality: Tensor, batch: int) -> None:
        top = len(self.config.lmbdas)
        in_range = _in_graph(quality) or ((quality >= 1) & (quality <= top)).all()
        if quality.shape not in ((), (1,), (batch,)) or not in_range:
            raise InvalidArgumentError(
                f"`quality` must be from 1 to {top}, one number or one for each of {batch} "
                f"images, got {quality.tolist()}"
            )

    def _check_noise(self, noise: Mapping[str, Tensor], x: Tensor) -> None:
        for name, shape in self.latent_shapes(*x.shape[-2:]).items():
            found = list(noise[name].shape) if name in noise else "none"
            if found != [x.shape[0], *shape]:
                raise InvalidArgumentError(
                    f"`noise` must hold {name} of shape {[x.shape[0], *shape]}, got {found}; "
                    "see `latent_shapes`"
                )

    def _synthesise(self, y_bar: Tensor, gains: Gains | None) -> Tensor:
        # In this order: MPS refuses to take a float64 tensor over.
        y_bar = y_bar.to(next(self.g_s.parameters()).dtype).to(self._device())
        if gains is not None:
            y_bar = y_bar * gains.inverse
        y_bar = y_bar.contiguous(memory_format=torch.channels_last)
        x_hat = self.g_s(y_bar, tiled.apply)
        return x_hat if self.bypass is None else x_hat + self.bypass.to_image(y_bar)


def pad(x: Tensor) -> Tensor:
    """Extend `[B, C, H, W]` to the right and downwards to multiples of 64.

    Each line is the one before, smoothed over more of its neighbours: detail that nobody sees would
    cost bits. Weights are powers of two, so that every machine computes the same.
    """
    height, width = x.shape[-2:]
    x = torch.cat([x, _lines_after(x[..., -1:, :], -height % MULTIPLE)], dim=-2)
    return torch.cat([x, _lines_after(x[..., -1:].mT, -width % MULTIPLE).mT], dim=-1)


def _lines_after(line: Tensor, count: int) -> Tensor:
    """Return the `count` lines of `pad` that follow a line `[B, C, 1, L]`."""
    lines = [line[..., :0, :]]
    for reach in range(1, count + 1):
        near = F.pad(line, (reach, reach, 0, 0), mode="replicate")
        line = line / 2 + (near[..., : -2 * reach] + near[..., 2 * reach :]) / 4
        lines.append(line)
    return torch.cat(lines, dim=-2)


def _check_device(device: str) -> None:
    """Try a device; torch has its own type of error for each way in which one can be missing."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 120)
        raise InvalidArgumentError(
            f"`device` must be one that PyTorch can use here, got {device!r} ({reason}); use cpu"
        ) from error


def _in_graph(x: Tensor) -> bool:
    """Whether what is done now becomes a graph, which cannot branch on values."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_images(x: Tensor, look: bool = False) -> None:
    """Check images `[B, 3, H, W]`; their values on the CPU, or anywhere with `look`.

    On a GPU a look at the values waits for it, and a compiler does not see them.
    """
    if not isinstance(x, Tensor):
        raise InvalidArgumentError(
            f"`x` must be a tensor of images [B, 3, H, W], got {type(x).__name__}; convert it first"
        )
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
        raise InvalidArgumentError(
            "`x` must be floating-point images [B, 3, H, W] in 0...1, "
            f"got {x.dtype}{list(x.shape)}; convert 8-bit images with .float() / 255"
        )
    has_values = type(x) is Tensor and not torch.compiler.is_compiling()
    if (look or x.device.type == "cpu") and has_values and x.detach().amax() > LARGEST_VALUE:
        raise InvalidArgumentError(
            f"`x` must be images in 0...1, got values up to {x.max():g}; divide 0...255 by 255"
        )


def _noisy(x: Tensor, noise: Tensor | None) -> Tensor:
    return x + (torch.empty_like(x).uniform_(-0.5, 0.5) if noise is None else noise)
