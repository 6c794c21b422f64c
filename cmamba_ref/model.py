"""CMamba: the whole model, with CompressAI's protocol.

    y = g_a(x)            z = h_a(y)            z_hat = Q(z)        Phi' = h_s(z_hat)
    y_hat, y_bar  slice by slice from Phi' (cmamba_ref.nn.context)     x_hat = g_s(y_bar)

Names are the field's: `g_a g_s h_a h_s y y_hat y_bar z z_hat x_hat`, as in the paper.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmamba_ref import weights
from cmamba_ref.bitstream import (
    QUALITY_UNITS,
    LatentPrefix,
    pack_latent,
    symbols_crc,
    unpack_latent,
)
from cmamba_ref.config import CONFIGS, CMambaConfig
from cmamba_ref.entropy import rans
from cmamba_ref.entropy.bounds import ste_round
from cmamba_ref.entropy.factorized import FactorizedPrior
from cmamba_ref.entropy.gaussian import (
    SCALE_LEVELS,
    GaussianConditional,
    choose_shift,
    scale_index,
)
from cmamba_ref.entropy.precision import float64_copy
from cmamba_ref.errors import BitstreamError, CMambaError, InvalidArgumentError, WeightsError
from cmamba_ref.nn import tiled
from cmamba_ref.nn.bypass import LinearBypass
from cmamba_ref.nn.context import ContextModel
from cmamba_ref.nn.gain import Gains, GainUnits
from cmamba_ref.nn.transforms import Analysis, HyperAnalysis, HyperSynthesis, Synthesis
from cmamba_ref.ops.autocast import without_autocast

# z lives at H/64: pictures are padded to a multiple of this.
MULTIPLE = 64
# Used where no quality is given, or the model's best if that is lower.
DEFAULT_QUALITY = 4.0
# The part of their information that symbols take at the very least in a rANS string.
RANS_LUCK = 0.95

# Threads that share a model wait for the one that copies its coding path, and copy none themselves.
# Not a part of the model, which could not be copied or pickled with it.
_copying = threading.Lock()

NOT_FINITE_INPUT = (
    "the entropy model gives values that are not finite; "
    "check the picture and the weights for NaN and infinity"
)
NOT_FINITE_STRING = (
    "the string leads to values that are not finite: it is damaged, or the weights are"
)


class ForwardOutput(TypedDict):
    """`x_hat` `[B, 3, H, W]`; likelihoods of y and z of the padded picture."""

    x_hat: Tensor
    likelihoods: dict[str, Tensor]


class CompressOutput(TypedDict):
    """`strings`: `[y strings, z strings]`, one of each per picture; `shape`: of z, `(h, w)`."""

    strings: list[list[bytes]]
    shape: tuple[int, int]


class CMamba(nn.Module):
    """The CMamba codec (Wu et al. 2025, arXiv 2502.04988), re-derived to its published totals.

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
        self._coding_path: tuple[object, nn.ModuleDict] | None = None
        self._known_id: tuple[object, bytes] | None = None

    # ---------------------------------------------------------------- training and estimation

    def forward(
        self,
        x: Tensor,
        quality: Tensor | float | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> ForwardOutput:
        """Reconstruct pictures and give the likelihoods of their latents.

        In training mode the rate is that of latents with uniform noise, and quantisation is
        straight-through everywhere else; in eval mode latents are rounded for both.

        Args:
            x: pictures `[B, 3, H, W]` in 0...1, any H, W >= 1; padded inside, by replication, to a
                multiple of 64 (likelihoods are those of the padded picture).
            quality: for a variable-rate model, 1...Q, one number or one per picture `[B]`; None for
                the default, 4.
            noise: for training mode, `y` and `z` as in `latent_shapes`, uniform in -0.5...0.5; None
                draws it from torch's generator.  A trainer that gives it decides which picture sees
                which noise, whatever the pictures are batched with.

        Raises:
            InvalidArgumentError: wrong shape or quality, or noise of another shape.
        """
        _check_pictures(x)
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
            widths = self.config.slice_widths
            z_noise = None if noise is None else noise["z"]
            y_noise = [None] * len(widths) if noise is None else noise["y"].split(widths, dim=1)
            z_seen = _noisy(z, z_noise) if self.training else z_hat
            z_likelihood = self.entropy_bottleneck.likelihood(z_seen)
            y_slices = y.split(widths, dim=1)
            y_likelihoods = []

            def quantise(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
                y_hat = ste_round(y_slices[i] - means) + means
                seen = _noisy(y_slices[i], y_noise[i]) if self.training else y_hat
                y_likelihoods.append(self.gaussian_conditional.likelihood(seen, means, log_scales))
                return y_hat

            y_bar = self.context(self.h_s(z_hat), quantise)
        x_hat = self._synthesise(y_bar, gains)
        return {
            "x_hat": x_hat[..., :height, :width],
            "likelihoods": {"y": torch.cat(y_likelihoods, dim=1), "z": z_likelihood},
        }

    def analyze(self, x: Tensor, quality: Tensor | float | None = None) -> Tensor:
        """Compute the scaled latent y of images: the tensor that the quantiser sees.

        Differentiable, as is `synthesize`; `synthesize(analyze(x, q), q)` is the reconstruction
        with the quantiser off, padded.  Our choice: y is taken after the gain of the quality.

        Args:
            x: images `[B, 3, H, W]` in 0...1, any H, W >= 1; padded inside, by replication, to a
                multiple of 64.
            quality: as in `forward`.

        Returns:
            `[B, M, h, w]`, the shape of y in `latent_shapes(H, W)`.

        Raises:
            InvalidArgumentError: wrong shape or quality.
        """
        _check_pictures(x)
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
        """Shapes `[C, h, w]` of `y` and `z` of a picture of `height` x `width` pixels."""
        rows, columns = -(-height // MULTIPLE), -(-width // MULTIPLE)
        per_z = MULTIPLE // 16  # positions of y along one side of a position of z
        return {
            "y": (self.config.latent_channels, per_z * rows, per_z * columns),
            "z": (self.config.hyper_widths[-1], rows, columns),
        }

    def aux_loss(self) -> Tensor:
        """Loss of the factorised prior's quantiles, for an optimiser of their own."""
        return self.entropy_bottleneck.aux_loss()

    # ---------------------------------------------------------------- coding

    def update(self, force: bool = False) -> bool:
        """Make the integer entropy tables once after training; loaded tables are never altered.

        Args:
            force: make them again, after further training.  Files written before can then no longer
                be read with this model.

        Returns:
            whether tables were made.
        """
        have_tables = self.gaussian_conditional.stored.filled
        if have_tables and not force:
            return False
        self.entropy_bottleneck.update()
        self.gaussian_conditional.update()
        return True

    def check_tables(self) -> None:
        """Check the entropy tables, where there are any.

        Raises:
            WeightsError: they are malformed, or of the wrong number.
        """
        for stored, count in (
            (self.gaussian_conditional.stored, SCALE_LEVELS),
            (self.entropy_bottleneck.stored, self.config.hyper_widths[-1]),
        ):
            if stored.filled and len(stored.tables()) != count:
                raise WeightsError(f"there must be {count} tables, got {len(stored.tables())}")

    @torch.no_grad()
    def compress(self, x: Tensor, quality: float | None = None) -> CompressOutput:
        """Code pictures into strings.

        Args:
            x: pictures `[B, 3, H, W]` in 0...1, padded by replication to a multiple of 64; what
                `decompress` returns has the padded size.
            quality: for a variable-rate model, 1...Q; None for the default, 4.

        Raises:
            InvalidArgumentError: wrong shape or quality.
            CMambaError: x, the weights or the latents hold NaN or infinity.
            WeightsError: the model has no entropy tables; call `update()`.
        """
        _check_pictures(x)
        quality = self.check_quality(quality)
        y_tables = self.gaussian_conditional.stored.tables()
        z_tables = self.entropy_bottleneck.stored.tables()
        z_symbols, y_symbols, all_log_scales = self.latent_symbols(x, quality)
        y_strings, z_strings = [], []
        z_index = self._z_index(z_symbols.shape[-2:])
        for b in range(x.shape[0]):
            z_block = _flat(z_symbols[b])
            y_blocks = [_flat(symbols[b]) for symbols in y_symbols]
            shift = choose_shift(torch.cat([s[b] for s in all_log_scales]))
            indexes = [_flat(scale_index(s[b], shift)) for s in all_log_scales]
            prefix = LatentPrefix(
                quality=0 if quality is None else round(quality * QUALITY_UNITS),
                shift=shift,
                crc=symbols_crc([z_block, *y_blocks]),
            )
            coded = rans.encode(y_tables, list(zip(y_blocks, indexes, strict=True)))
            y_strings.append(pack_latent(prefix, coded))
            z_strings.append(rans.encode(z_tables, [(z_block, z_index)]))
        shape = z_symbols.shape[-2], z_symbols.shape[-1]
        return {"strings": [y_strings, z_strings], "shape": shape}

    @torch.no_grad()
    def latent_symbols(
        self, x: Tensor, quality: float | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute the integers that `compress` codes.

        Args:
            x: images `[B, 3, H, W]` in 0...1, padded by replication to a multiple of 64.
            quality: as in `compress`.

        Returns:
            z symbols `[B, Z, h, w]`; for each slice of y its symbols and the logarithm of the scale
            of each, `[B, C, 4 h, 4 w]`.  All float64, symbols rounded.

        Raises:
            InvalidArgumentError: wrong shape or quality.
            CMambaError: x, the weights or the latents hold NaN or infinity.
        """
        _check_pictures(x)
        y, _ = self._analyse(pad(x), self.check_quality(quality))
        z = self.h_a(y)
        coding, device = self._coding()
        with without_autocast(device):
            y, z = y.to(device, torch.float64), z.to(device, torch.float64)
            medians = self._medians(device)
            z_symbols = _to_symbols(z - medians, "z")
            y_slices = y.split(self.config.slice_widths, dim=1)
            y_symbols: list[Tensor] = []
            all_log_scales: list[Tensor] = []

            def quantise(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
                symbols = _to_symbols(y_slices[i] - means, "y")
                _check_finite(log_scales, CMambaError, NOT_FINITE_INPUT)
                y_symbols.append(symbols)
                all_log_scales.append(log_scales)
                return symbols + means

            y_bar = coding["context"](coding["h_s"](z_symbols + medians), quantise)
            _check_finite(y_bar, CMambaError, NOT_FINITE_INPUT)
        return z_symbols, y_symbols, all_log_scales

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Decode strings into pictures.

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

    @torch.no_grad()
    def decode_latent(
        self, strings: list[list[bytes]], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """The first half of `decompress`: strings to y_bar in float64, and qualities `[B]`."""
        if min(shape) < 1:
            raise BitstreamError(f"the shape of z must be positive, got {tuple(shape)}")
        y_strings, z_strings = strings
        if len(y_strings) != len(z_strings) or not y_strings:
            raise BitstreamError(
                f"{len(y_strings)} y strings and {len(z_strings)} z strings; "
                "there must be one of each per picture"
            )
        prefixes, coded = zip(*map(unpack_latent, y_strings), strict=True)
        quality = self._stored_quality([prefix.quality for prefix in prefixes])
        y_tables = self.gaussian_conditional.stored.tables()
        z_tables = self.entropy_bottleneck.stored.tables()
        for y_string, z_string in zip(coded, z_strings, strict=True):
            self._check_lengths(y_string, z_string, shape)
        coding, device = self._coding()
        z_channels, (height, width) = self.config.hyper_widths[-1], shape
        z_index = self._z_index(shape)

        seen = []  # per picture: every block of symbols, in coding order
        for string in z_strings:
            decoder = rans.Decoder(z_tables, string)
            seen.append([decoder.take(z_index)])
            decoder.finish()
        y_decoders = [rans.Decoder(y_tables, string) for string in coded]

        with without_autocast(device):
            z_symbols = torch.stack(
                [torch.from_numpy(blocks[0]).view(z_channels, height, width) for blocks in seen]
            ).to(device, torch.float64)

            def read(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
                for b, decoder in enumerate(y_decoders):
                    _check_finite(log_scales[b], BitstreamError, NOT_FINITE_STRING)
                    index = scale_index(log_scales[b], prefixes[b].shift)
                    seen[b].append(decoder.take(_flat(index)))
                symbols = [torch.from_numpy(blocks[-1]).view(means.shape[1:]) for blocks in seen]
                return torch.stack(symbols).to(device, torch.float64) + means

            y_bar = coding["context"](coding["h_s"](z_symbols + self._medians(device)), read)
        for prefix, blocks, decoder in zip(prefixes, seen, y_decoders, strict=True):
            decoder.finish()
            if symbols_crc(blocks) != prefix.crc:
                raise BitstreamError(
                    "the decoded symbols fail their check: the string is damaged, or this machine "
                    "computed other scales than the encoder's"
                )
        return y_bar, quality

    @torch.no_grad()
    def reconstruct(self, y_bar: Tensor, quality: Tensor | None) -> Tensor:
        """The second half of `decompress`: y_bar to pictures `[B, 3, 16 h, 16 w]` in 0...1.

        Raises:
            BitstreamError: the picture is not finite.
        """
        x_hat = self.synthesize(y_bar, quality)
        _check_finite(x_hat, BitstreamError, NOT_FINITE_STRING)
        return x_hat.clamp(0, 1)

    def check_quality(self, quality: float | None) -> float | None:
        """A quality as it is stored, in hundredths; None for a model of one rate.

        Args:
            quality: None for the default, 4.

        Raises:
            InvalidArgumentError: out of range, or given to a model of one rate.
        """
        if self.gain is None:
            if quality is not None:
                raise InvalidArgumentError(
                    f"`quality` must be None, got {quality}; {self.config.name!r} has one rate"
                )
            return None
        top = len(self.config.lmbdas)
        if quality is None:
            return min(DEFAULT_QUALITY, top)
        if not 1 <= quality <= top:
            raise InvalidArgumentError(
                f"`quality` must be a number from 1 to {top}, got {quality}; "
                "1 gives the smallest files"
            )
        return round(float(quality) * QUALITY_UNITS) / QUALITY_UNITS

    # ---------------------------------------------------------------- weights

    @property
    def model_id(self) -> bytes:
        """Eight bytes that name these weights and tables; files carry them.

        The id is that of the weights as loaded or trained: moving or casting the model, by `.to`,
        `.half` or `.bfloat16`, does not change it; casting a part of it by itself does.
        """
        key = _fingerprint(self)
        if self._known_id is None or self._known_id[0] != key:
            self._known_id = (key, weights.content_id(self.state_dict()))
        return self._known_id[1]

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, device: str = "cpu") -> CMamba:
        """A model in eval mode, from weights that `save_pretrained` wrote.

        Args:
            source: the name of a model that ships, "tiny"; or a directory; or "user/repository" of
                the Hugging Face Hub, where there is no such directory (extra: hub).

        Raises:
            WeightsError: nothing there, damaged, or not to be downloaded.
        """
        return weights.load(cls, source).to(device).eval()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json`, `model.safetensors` and its hash into `directory`."""
        weights.save(self, directory)

    # ---------------------------------------------------------------- inside

    def _apply(self, fn, recurse: bool = True) -> CMamba:
        tables = self.gaussian_conditional.stored
        named = self.model_id if tables.filled and not tables.cdf.is_meta else None
        super()._apply(fn, recurse)
        if named is not None and not tables.cdf.is_meta:
            self._known_id = (_fingerprint(self), named)
        return self

    def _device(self) -> torch.device:
        return next(self.g_a.parameters()).device

    def _analyse(self, x: Tensor, quality: Tensor | float | None) -> tuple[Tensor, Gains | None]:
        """The scaled latent y, and the gains for g_s."""
        first = next(self.g_a.parameters())
        x = x.to(first.device, first.dtype).contiguous(memory_format=torch.channels_last)
        gains = self._gains(quality, x.shape[0])
        y = self.g_a(x, None if gains is None else gains.analysis, tiled.apply)
        if self.bypass is not None:
            y = y + self.bypass.to_latent(x)
        return y if gains is None else y * gains.latent, gains

    def _gains(self, quality: Tensor | float | None, batch: int) -> Gains | None:
        """The gains of each image; None for a fixed-rate model."""
        if self.gain is None:
            self.check_quality(quality)  # type: ignore[arg-type]
            return None
        if isinstance(quality, Tensor):
            self._check_qualities(quality, batch)
        else:
            quality = torch.tensor(self.check_quality(quality))
        return self.gain(quality.float().to(self._device(), non_blocking=True).expand(batch))

    def _check_qualities(self, quality: Tensor, batch: int) -> None:
        top = len(self.config.lmbdas)
        # A compiled graph cannot branch on values: there only the shape is checked.
        in_range = torch.compiler.is_compiling() or ((quality >= 1) & (quality <= top)).all()
        if quality.shape not in ((), (1,), (batch,)) or not in_range:
            raise InvalidArgumentError(
                f"`quality` must be from 1 to {top}, one number or one for each of {batch} "
                f"pictures, got {quality.tolist()}"
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
        feature_gain = None
        if gains is not None:
            y_bar, feature_gain = y_bar * gains.inverse, gains.synthesis
        y_bar = y_bar.contiguous(memory_format=torch.channels_last)
        x_hat = self.g_s(y_bar, feature_gain, tiled.apply)
        return x_hat if self.bypass is None else x_hat + self.bypass.to_image(y_bar)

    def _coding(self) -> tuple[nn.ModuleDict, torch.device]:
        """h_s and the context model in float64, renewed whenever a weight has changed."""
        path = nn.ModuleDict({"h_s": self.h_s, "context": self.context})
        # MPS has no float64: the path runs on the CPU there.
        device = self._device() if self._device().type != "mps" else torch.device("cpu")
        with _copying:
            key = (_fingerprint(path), device)
            known = self._coding_path
            if known is None or known[0] != key:
                copies = {name: float64_copy(module, device) for name, module in path.items()}
                # In a tuple, so that it is no submodule: it is derived, not a part of the model.
                self._coding_path = known = (key, nn.ModuleDict(copies))
        return known[1], device

    def _medians(self, device: torch.device) -> Tensor:
        return self.entropy_bottleneck.medians.to(device, torch.float64)

    def _z_index(self, shape: tuple[int, int] | torch.Size) -> np.ndarray:
        """The table of each element of z: its channel."""
        height, width = shape
        channels = np.arange(self.config.hyper_widths[-1], dtype=np.int32)
        return np.repeat(channels, height * width)

    def _check_lengths(self, y_string: bytes, z_string: bytes, shape: tuple[int, int]) -> None:
        """Refuse strings too short for latents whose z is of `shape`, before allocating those.

        Every symbol takes at least the information of the likeliest entry of its table, but for
        rANS, which may undercut that by about 1 % where its rounding is lucky.
        """
        positions = shape[0] * shape[1]
        z_bits = positions * self.entropy_bottleneck.stored.tables().cheapest_bits().sum()
        y_elements = positions * (MULTIPLE // 16) ** 2 * self.config.latent_channels
        y_bits = y_elements * self.gaussian_conditional.stored.tables().cheapest_bits().min()
        for name, string, bits in (("y", y_string, y_bits), ("z", z_string, z_bits)):
            needed = int(RANS_LUCK * bits / 8)
            if len(string) < needed:
                raise BitstreamError(
                    f"a {name} string of {len(string)} bytes cannot hold a picture of "
                    f"{shape[1] * MULTIPLE}x{shape[0] * MULTIPLE} pixels, which needs at least "
                    f"{needed}"
                )

    def _stored_quality(self, stored: list[int]) -> Tensor | None:
        top = len(self.config.lmbdas) * QUALITY_UNITS
        for value in stored:
            valid = value == 0 if self.gain is None else QUALITY_UNITS <= value <= top
            if not valid:
                raise BitstreamError(
                    f"quality {value / QUALITY_UNITS} is none that {self.config.name!r} has"
                )
        if self.gain is None:
            return None
        return torch.tensor(stored, dtype=torch.float64) / QUALITY_UNITS


def pad(x: Tensor) -> Tensor:
    """Replicate the last row and column of `[B, C, H, W]` up to a multiple of 64."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")


def _check_pictures(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape or not x.is_floating_point():
        raise InvalidArgumentError(
            f"`x` must be floating-point pictures [B, 3, H, W], got {x.dtype}{list(x.shape)}"
        )


def _noisy(x: Tensor, noise: Tensor | None) -> Tensor:
    return x + (torch.empty_like(x).uniform_(-0.5, 0.5) if noise is None else noise)


def _to_symbols(values: Tensor, name: str) -> Tensor:
    """Round float64 values to whole numbers that fit int32."""
    symbols = torch.round(values)
    if not (symbols.abs() < 2**31).all():  # also false for NaN
        raise CMambaError(
            f"the latent {name} is not finite (or beyond 32 bits); "
            "check the picture and the weights for NaN and infinity"
        )
    return symbols


def _check_finite(values: Tensor, error: type[CMambaError], message: str) -> None:
    if not torch.isfinite(values).all():
        raise error(message)


def _flat(values: Tensor):
    return values.to("cpu", torch.int32).flatten().numpy()


def _fingerprint(module: nn.Module) -> list[tuple]:
    """Changes whenever a parameter or buffer is replaced or written to.

    The sum of the bits is for writes that leave no other trace, through `.data` or in inference
    mode, and for memory that was given back and holds another tensor by now.  It is exact, so it
    never changes by itself; it does not notice values that such a write only put in another order.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = (*module.parameters(), *module.buffers())
    return [
        (
            t.data_ptr(),
            0 if t.is_inference() else t._version,
            t.dtype,
            int(t.detach().view(whole[t.element_size()]).sum()),
        )
        for t in tensors
    ]
