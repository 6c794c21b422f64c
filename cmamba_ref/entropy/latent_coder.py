"""The latent coder: latents y and z to strings, and strings to y_bar.

    z symbols = round(z - medians)                    y symbols = round(y - means), slice by slice
    Phi' = h_s(z symbols + medians)                   y_bar = context(Phi')

Both directions run h_s and the context model in float64, on the weights as stored, whatever
precision the transforms have (`cmamba_ref.entropy.precision`), and give the scale of every symbol
to the same slice loop, `ContextModel.forward`.

Skip mode: where the scale is so small that its table is one of the first `SKIPPED_TABLES`, a symbol
is nearly always 0; it is taken as 0 and not coded.  Elsewhere rounding has a dead zone at 0, see
`cmamba_ref.entropy.dead_zone`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from cmamba_ref.config import CMambaConfig
from cmamba_ref.entropy import rans
from cmamba_ref.entropy.dead_zone import is_zeroed
from cmamba_ref.entropy.factorized import FactorizedPrior
from cmamba_ref.entropy.gaussian import (
    SCALE_LEVELS,
    GaussianConditional,
    choose_shift,
    scale_index,
)
from cmamba_ref.entropy.latent_prefix import (
    QUALITY_UNITS,
    LatentPrefix,
    pack_latent,
    symbols_crc,
    unpack_latent,
)
from cmamba_ref.entropy.precision import float64_copy
from cmamba_ref.entropy.tables import CdfTables
from cmamba_ref.errors import BitstreamError, CMambaError, WeightsError
from cmamba_ref.model_id import fingerprint
from cmamba_ref.ops.autocast import without_autocast
from cmamba_ref.stages import ENTROPY_CODER, stage

# z lives at H/64 and y at H/16: images are padded to a multiple of the former.
MULTIPLE = 64
# Positions of y along one side of a position of z.
Y_PER_Z = MULTIPLE // 16
# Lower bound on stream length relative to the information content of its symbols: where rounding
# is lucky, rANS undercuts that by about 1 %.
RANS_SLACK = 0.95

# Tables of y, from that of the smallest scale on, whose symbols are not coded but 0.  Our choice:
# what saves rate as well as time, see docs/benchmarks.md.
SKIPPED_TABLES = 6

# Threads that share a model wait for the one that copies its coding path, and copy none themselves.
# Not part of the copies, which could not be pickled or copied with a lock inside.
_copying = threading.Lock()

NOT_FINITE_INPUT = (
    "the entropy model gives values that are not finite; "
    "check the image and the weights for NaN and infinity"
)
NOT_FINITE_STRING = (
    "the string leads to values that are not finite: it is damaged, or the weights are"
)


class CompressOutput(TypedDict):
    """`strings`: `[y strings, z strings]`, one of each per image; `shape`: of z, `(h, w)`."""

    strings: list[list[bytes]]
    shape: tuple[int, int]


class LatentSymbols(NamedTuple):
    """What coding writes of latents: integers, and what it codes those of y with.

    Attributes:
        z: symbols of z `[B, Z, h, w]`.
        y: symbols of each slice of y, `[B, C, 4 h, 4 w]`.
        log_scales: logarithm of the scale of each symbol of `y`.
        y_bar: what a decoder makes of them `[B, M, 4 h, 4 w]`.

    All are float64, symbols rounded.
    """

    z: Tensor
    y: list[Tensor]
    log_scales: list[Tensor]
    y_bar: Tensor


def hyper_latent_shape(height: int, width: int) -> tuple[int, int]:
    """Return the shape `(h, w)` of z for an image of `height` x `width` pixels."""
    return -(-height // MULTIPLE), -(-width // MULTIPLE)


class Float64Path:
    """Float64 copies of h_s and the context model, renewed whenever a weight has changed.

    They are derived from a model, not part of it: no submodule, and in no state_dict.
    """

    def __init__(self) -> None:
        self._known: tuple[object, nn.ModuleDict] | None = None

    def copies_of(self, modules: nn.ModuleDict, device: torch.device) -> nn.ModuleDict:
        """Return the modules in float64 on `device`; threads share one copy."""
        with _copying:
            key = (fingerprint(modules), device)
            known = self._known
            if known is None or known[0] != key:
                copies = {name: float64_copy(module, device) for name, module in modules.items()}
                self._known = known = (key, nn.ModuleDict(copies))
        return known[1]


@dataclass(frozen=True)
class LatentCoder:
    """Codes the latents of one model.  `CMamba.latent_coder` makes it; `CMamba.compress` uses it.

    Attributes:
        config: of the model.
        h_s, context: as the model holds them, in any precision that they were stored in.
        entropy_bottleneck, gaussian_conditional: the priors of z and y, with their tables.
        float64: keeps the copies of h_s and context from one use to the next.
    """

    config: CMambaConfig
    h_s: nn.Module
    context: nn.Module
    entropy_bottleneck: FactorizedPrior
    gaussian_conditional: GaussianConditional
    float64: Float64Path

    @property
    def device(self) -> torch.device:
        """Where the float64 path runs: where the weights are, but on the CPU for MPS."""
        device = next(self.h_s.parameters()).device
        return device if device.type != "mps" else torch.device("cpu")  # MPS has no float64

    def float64_modules(self) -> nn.ModuleDict:
        """Return h_s and context in float64 on `device`, as coding runs them."""
        path = nn.ModuleDict({"h_s": self.h_s, "context": self.context})
        return self.float64.copies_of(path, self.device)

    def medians(self) -> Tensor:
        """Return the medians of z, float64 `[Z, 1, 1]` on `device`."""
        return self.entropy_bottleneck.medians.to(self.device, torch.float64)

    def z_index(self, shape: tuple[int, int]) -> np.ndarray:
        """Return the table of each element of z `[Z, h, w]`, flat: its channel."""
        height, width = shape
        channels = np.arange(self.config.hyper_widths[-1], dtype=np.int32)
        return np.repeat(channels, height * width)

    def tables(self) -> tuple[CdfTables, CdfTables]:
        """Return the integer tables of y and of z.

        Raises:
            WeightsError: the model has none; call `CMamba.update()`.
        """
        return self.gaussian_conditional.stored.tables(), self.entropy_bottleneck.stored.tables()

    def update(self, force: bool) -> bool:
        """Make the integer tables where there are none, or with `force`; return whether it did."""
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
    def symbols(self, y: Tensor, z: Tensor, slope: Tensor | None = None) -> LatentSymbols:
        """Compute the integers that `encode` codes.

        Args:
            y: scaled latents `[B, M, 4 h, 4 w]`, of any floating-point type.
            z: hyper-latents `[B, Z, h, w]`.
            slope: of the dead zone, see `is_zeroed`, to be broadcast to y; None for no dead zone.

        Raises:
            CMambaError: the latents or the weights hold NaN or infinity.
        """
        coding, device = self.float64_modules(), self.device
        with without_autocast(device):
            y, z = y.to(device, torch.float64), z.to(device, torch.float64)
            medians = self.medians()
            z_symbols = _to_symbols(z - medians, "z")
            y_slices = y.split(self.config.slice_widths, dim=1)
            y_symbols: list[Tensor] = []
            all_log_scales: list[Tensor] = []

            def quantise(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
                residual = y_slices[i] - means
                symbols = _to_symbols(residual, "y")
                check_finite(log_scales, CMambaError, NOT_FINITE_INPUT)
                symbols[is_zeroed(residual, log_scales, SKIPPED_TABLES, slope)] = 0
                y_symbols.append(symbols)
                all_log_scales.append(log_scales)
                return symbols + means

            y_bar = coding["context"](coding["h_s"](z_symbols + medians), quantise)
            check_finite(y_bar, CMambaError, NOT_FINITE_INPUT)
        return LatentSymbols(z_symbols, y_symbols, all_log_scales, y_bar)

    def encode(self, symbols: LatentSymbols, quality: float | None) -> CompressOutput:
        """Code symbols into strings.

        Args:
            quality: the one that y was scaled for, as `CMamba.check_quality` gives it.

        Raises:
            WeightsError: the model has no entropy tables.
            CMambaError: a symbol of a skipped table is not 0, or no shift suits all scales.
        """
        y_tables, z_tables = self.tables()
        batch, _, height, width = symbols.z.shape
        z_index = self.z_index((height, width))
        y_strings, z_strings = [], []
        for b in range(batch):
            z_block = _flat(symbols.z[b])
            y_blocks = [_flat(s[b]) for s in symbols.y]
            shift = choose_shift(torch.cat([s[b] for s in symbols.log_scales]))
            indexes = [_flat(scale_index(s[b], shift)) for s in symbols.log_scales]
            prefix = LatentPrefix(
                quality=0 if quality is None else round(quality * QUALITY_UNITS),
                shift=shift,
                skipped=SKIPPED_TABLES,
                crc=symbols_crc([z_block, *y_blocks]),
            )
            coded_blocks = []
            for block, index in zip(y_blocks, indexes, strict=True):
                is_coded = index >= prefix.skipped
                if block[~is_coded].any():
                    raise CMambaError("a symbol of a table that is skipped must be 0")
                coded_blocks.append((block[is_coded], index[is_coded]))
            with stage(ENTROPY_CODER):
                coded = rans.encode(y_tables, coded_blocks)
                z_strings.append(rans.encode(z_tables, [(z_block, z_index)]))
            y_strings.append(pack_latent(prefix, coded))
        return {"strings": [y_strings, z_strings], "shape": (height, width)}

    @torch.no_grad()
    def decode(
        self, strings: list[list[bytes]], shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """Decode strings into y_bar.

        Args:
            strings: `[y strings, z strings]` as `encode` returned them.
            shape: of z, `(h, w)`.

        Returns:
            y_bar, float64 `[B, M, 4 h, 4 w]` on `device`, and the qualities, float64 `[B]`; None
            for a fixed-rate model.

        Raises:
            BitstreamError: a string is damaged, or was made by another model.
            WeightsError: the model has no entropy tables.
        """
        if min(shape) < 1:
            raise BitstreamError(f"the shape of z must be positive, got {tuple(shape)}")
        y_strings, z_strings = strings
        if len(y_strings) != len(z_strings) or not y_strings:
            raise BitstreamError(
                f"{len(y_strings)} y strings and {len(z_strings)} z strings; "
                "there must be one of each per image"
            )
        prefixes, coded = zip(*map(unpack_latent, y_strings), strict=True)
        quality = self._stored_quality([prefix.quality for prefix in prefixes])
        y_tables, z_tables = self.tables()
        for prefix, *pair in zip(prefixes, coded, z_strings, strict=True):
            if prefix.skipped > SCALE_LEVELS:
                raise BitstreamError(f"a y string is malformed: {prefix.skipped} skipped tables")
            self._check_lengths(prefix.skipped, pair, y_tables, z_tables, shape)
        coding, device = self.float64_modules(), self.device
        z_channels, (height, width) = self.config.hyper_widths[-1], shape
        z_index = self.z_index(shape)

        seen = []  # per image: every block of symbols, in coding order
        with stage(ENTROPY_CODER):
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
                    check_finite(log_scales[b], BitstreamError, NOT_FINITE_STRING)
                    index = _flat(scale_index(log_scales[b], prefixes[b].shift))
                    is_coded = index >= prefixes[b].skipped
                    symbols = np.zeros_like(index)
                    with stage(ENTROPY_CODER):
                        symbols[is_coded] = decoder.take(index[is_coded])
                    seen[b].append(symbols)
                blocks = [torch.from_numpy(of_image[-1]).view(means.shape[1:]) for of_image in seen]
                return torch.stack(blocks).to(device, torch.float64) + means

            y_bar = coding["context"](coding["h_s"](z_symbols + self.medians()), read)
        for prefix, blocks, decoder in zip(prefixes, seen, y_decoders, strict=True):
            decoder.finish()
            if symbols_crc(blocks) != prefix.crc:
                raise BitstreamError(
                    "the decoded symbols fail their check: the string is damaged, or this machine "
                    "computed other scales than the encoder's"
                )
        return y_bar, quality

    def _check_lengths(
        self,
        skipped: int,
        strings: Iterable[bytes],
        y_tables: CdfTables,
        z_tables: CdfTables,
        shape: tuple[int, int],
    ) -> None:
        """Refuse strings (y, z) too short for latents whose z is of `shape`, before allocating any.

        Every symbol takes at least the information of the likeliest entry of its table, but for
        `RANS_SLACK`; skipped ones take nothing.
        """
        positions = shape[0] * shape[1]
        z_bits = positions * z_tables.cheapest_bits().sum()
        y_elements = positions * Y_PER_Z**2 * self.config.latent_channels
        y_bits = 0 if skipped else y_elements * y_tables.cheapest_bits().min()
        for name, string, bits in zip("yz", strings, (y_bits, z_bits), strict=True):
            needed = int(RANS_SLACK * bits / 8)
            if len(string) < needed:
                raise BitstreamError(
                    f"a {name} string of {len(string)} bytes cannot hold an image of "
                    f"{shape[1] * MULTIPLE}x{shape[0] * MULTIPLE} pixels, which needs at least "
                    f"{needed}"
                )

    def _stored_quality(self, stored: list[int]) -> Tensor | None:
        is_variable, top = self.config.variable_rate, len(self.config.lmbdas) * QUALITY_UNITS
        for value in stored:
            valid = QUALITY_UNITS <= value <= top if is_variable else value == 0
            if not valid:
                raise BitstreamError(
                    f"quality {value / QUALITY_UNITS} is out of range for {self.config.name!r}"
                )
        if not is_variable:
            return None
        return torch.tensor(stored, dtype=torch.float64, device="cpu") / QUALITY_UNITS


def check_finite(values: Tensor, error: type[CMambaError], message: str) -> None:
    """Raise `error(message)` where values hold NaN or infinity."""
    if not torch.isfinite(values).all():
        raise error(message)


def _to_symbols(values: Tensor, name: str) -> Tensor:
    """Round float64 values to whole numbers that fit int32."""
    symbols = torch.round(values)
    if not (symbols.abs() < 2**31).all():  # also false for NaN
        raise CMambaError(
            f"the latent {name} is not finite (or beyond 32 bits); "
            "check the image and the weights for NaN and infinity"
        )
    return symbols


def _flat(values: Tensor) -> np.ndarray:
    return values.to("cpu", torch.int32).flatten().numpy()
