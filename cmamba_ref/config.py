"""Sizes of a CMamba model: one frozen dataclass, three named configurations, to and from JSON.

The paper publishes no layer sizes, and its totals only against another model.  `base` is
*re-derived to those totals* (56.26 M parameters, 362.7 GMACs at 768x512); it is not the authors'
configuration, which is unknown.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields

from cmamba_ref.errors import InvalidArgumentError

# One lambda per quality 1...8 of a variable-rate model, log-spaced between two values of the
# field's ladder (0.0018 and 0.18, the MSE lambdas of CompressAI's qualities 1 and 8).
VARIABLE_RATE_LMBDAS = tuple(0.0018 * (0.18 / 0.0018) ** (i / 7) for i in range(8))

# What `context` may be; the first is the paper's. Blocks are registered, see cmamba_ref.nn.blocks.
CONTEXTS = ("cae", "cae-without-ssm", "none")
# Options that `to_json` leaves out at their defaults, so that versions without them read the file.
LATER_OPTIONS = ("bypass", "metric")
# What the distortion of the training loss may be.
METRICS = ("mse", "ms-ssim")


@dataclass(frozen=True)
class CMambaConfig:
    """Every size that defines a CMamba model.

    Attributes:
        name: what files and messages call the model.
        widths: channels of the three stages of g_a at H/2, H/4, H/8 (g_s mirrors them).
        depths: CA-SSM blocks in each of those stages.
        ssm_stages: whether a stage has the global (VSS) path; a stage without it is built of
            ResBlocks alone.  The paper has it everywhere.
        latent_channels: channels M of the latent y at H/16.
        hyper_widths: channels of the hyper transforms between y and z; the last is that of z.
        slices: groups of channels of y that are coded one after another (CAE): how many groups of
            equal size, or the channels of each group.  `slice_widths` has the latter for both.
        cae_width: channels of the CAE inside one slice.  `None` gives the paper's literal equation,
            whose width is twice the slice's channels and which has no head.
        lrp_widths: hidden channels of the latent residual prediction.
        d_state: states N per channel and direction of every scan.
        ssm_ratio: inner channels of SS2D over its input channels.
        fusion_reduction: input channels over hidden channels in the fusion MLP.
        block: what a stage with the global path is built of.  "ca-ssm" is the paper's; the others
            are there to be compared with it: both paths, joined by "sum" or "concatenation"
            instead of attention; one of them alone, "ssm" or "cnn"; or "gdn", which makes every
            stage one of divisive normalisation (Ballé et al. 2016), without any path.  More are
            added by `cmamba_ref.nn.blocks.register_block`.
        context: where means and scales come from.  "cae" is the paper's; "cae-without-ssm" leaves
            its scan out, and so sees one position at a time; "none" takes both from the
            hyperprior alone (Minnen et al. 2018).
        lrp: whether latent residual prediction follows.
        lmbdas: empty for a fixed-rate model; else one lambda per quality 1, 2, ...: the model has
            gain vectors (Cui et al. 2021) and serves every quality between 1 and `len(lmbdas)`.
        bypass: whether a linear path between 16x16 blocks of the image and y stands beside g_a and
            g_s (`cmamba_ref.nn.bypass`).
        metric: what the weights are trained for, "mse" or "ms-ssim"; the latter may have a share of
            squared error.

    Raises:
        InvalidArgumentError: a size is not positive, or sizes do not fit together.
    """

    name: str
    widths: tuple[int, int, int]
    depths: tuple[int, int, int]
    latent_channels: int
    hyper_widths: tuple[int, int]
    slices: int | tuple[int, ...]
    cae_width: int | None
    lrp_widths: tuple[int, int]
    ssm_stages: tuple[bool, bool, bool] = (True, True, True)
    d_state: int = 16
    ssm_ratio: float = 2.0
    fusion_reduction: int = 4
    block: str = "ca-ssm"
    context: str = CONTEXTS[0]
    lrp: bool = True
    lmbdas: tuple[float, ...] = field(default=())
    bypass: bool = False
    metric: str = METRICS[0]

    def __post_init__(self) -> None:
        for arg in ("name", "block"):
            if not isinstance(getattr(self, arg), str):
                raise InvalidArgumentError(
                    f"`{arg}` must be text, got {getattr(self, arg)!r:.80}; see CMambaConfig"
                )
        for arg, length in (
            ("widths", 3),
            ("depths", 3),
            ("ssm_stages", 3),
            ("hyper_widths", 2),
            ("lrp_widths", 2),
        ):
            value = tuple(getattr(self, arg))
            object.__setattr__(self, arg, value)
            if len(value) != length:
                raise InvalidArgumentError(
                    f"`{arg}` must have {length} entries, got {len(value)}; see CMambaConfig"
                )
        try:
            object.__setattr__(self, "lmbdas", tuple(float(value) for value in self.lmbdas))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgumentError(
                f"`lmbdas` must be numbers, got {self.lmbdas!r:.80}; see CMambaConfig"
            ) from error
        if isinstance(self.slices, list):  # from JSON
            object.__setattr__(self, "slices", tuple(self.slices))
        sizes: dict[str, object] = {
            "widths": self.widths,
            "hyper_widths": self.hyper_widths,
            "lrp_widths": self.lrp_widths,
            "latent_channels": (self.latent_channels,),
            "slices": self.slices if isinstance(self.slices, tuple) else (self.slices,),
            "d_state": (self.d_state,),
            "fusion_reduction": (self.fusion_reduction,),
            "cae_width": () if self.cae_width is None else (self.cae_width,),
        }
        for arg, values in sizes.items():
            for value in values:  # type: ignore[attr-defined]
                if not _is_int(value) or not 1 <= value <= 65536:
                    raise InvalidArgumentError(
                        f"`{arg}` must be a positive integer of at most 65536, got {value!r}; "
                        "see CMambaConfig"
                    )
        if not all(_is_int(depth) and 0 <= depth <= 1024 for depth in self.depths):
            raise InvalidArgumentError(
                f"`depths` must be integers from 0 to 1024, got {self.depths}; see CMambaConfig"
            )
        if not all(isinstance(flag, bool) for flag in self.ssm_stages):
            raise InvalidArgumentError(
                f"`ssm_stages` must be true or false for each stage, got {self.ssm_stages}; "
                "see CMambaConfig"
            )
        if self.context not in CONTEXTS:
            raise InvalidArgumentError(
                f"`context` must be one of {CONTEXTS}, got {self.context!r:.80}; see CMambaConfig"
            )
        if self.metric not in METRICS:
            raise InvalidArgumentError(
                f"`metric` must be one of {METRICS}, got {self.metric!r:.80}; see CMambaConfig"
            )
        for arg in ("lrp", "bypass"):
            if not isinstance(getattr(self, arg), bool):
                raise InvalidArgumentError(
                    f"`{arg}` must be true or false, got {getattr(self, arg)!r:.80}; "
                    "see CMambaConfig"
                )
        if not 0 < self.ssm_ratio <= 64:
            raise InvalidArgumentError(
                f"`ssm_ratio` must be above 0 and at most 64, got {self.ssm_ratio}; "
                "the paper's peers use 2"
            )
        if isinstance(self.slices, tuple):
            if sum(self.slices) != self.latent_channels:
                raise InvalidArgumentError(
                    "`slices` must sum to `latent_channels`, got a sum of "
                    f"{sum(self.slices)} and {self.latent_channels}; change one of them"
                )
        elif self.latent_channels % self.slices:
            raise InvalidArgumentError(
                f"`latent_channels` must be a multiple of `slices`, got {self.latent_channels} and "
                f"{self.slices}; change one of them"
            )
        # Files store a quality in hundredths, in two bytes.
        if not 2 <= len(self.lmbdas) <= 655 and self.lmbdas:
            raise InvalidArgumentError(
                f"`lmbdas` must be empty or 2 to 655 numbers, got {len(self.lmbdas)}; "
                "a fixed-rate model has no `lmbdas`"
            )
        if not all(math.isfinite(value) and value > 0 for value in self.lmbdas):
            raise InvalidArgumentError(f"`lmbdas` must be positive, got {self.lmbdas}")

    @property
    def slice_widths(self) -> tuple[int, ...]:
        """Channels of y in each slice."""
        if isinstance(self.slices, tuple):
            return self.slices
        return (self.latent_channels // self.slices,) * self.slices

    @property
    def stages_with_scan(self) -> tuple[bool, ...]:
        """Whether each stage of g_a and g_s has a scan."""
        return tuple(stage and self.block not in ("cnn", "gdn") for stage in self.ssm_stages)

    @property
    def variable_rate(self) -> bool:
        """Whether one set of weights serves a range of qualities."""
        return bool(self.lmbdas)

    def to_json(self) -> str:
        """Write a JSON object with one key per attribute, without later options at defaults."""
        values = {
            f.name: value
            for f, value in zip(fields(self), asdict(self).values(), strict=True)
            if f.name not in LATER_OPTIONS or value != f.default
        }
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CMambaConfig:
        """The configuration written by `to_json`.

        Raises:
            InvalidArgumentError: not JSON, an unknown or missing key, or a value out of range.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidArgumentError(f"`text` must be JSON, got {error}") from error
        if not isinstance(values, dict):
            raise InvalidArgumentError(f"`text` must be a JSON object, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidArgumentError(
                f"`text` must have only the keys of CMambaConfig, got {unknown}; "
                "was it written by another version?"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise InvalidArgumentError(f"`text` must describe a CMambaConfig: {error}") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


BASE = CMambaConfig(
    name="base",
    widths=(96, 192, 320),
    depths=(1, 2, 3),
    latent_channels=320,
    hyper_widths=(256, 192),
    slices=5,
    cae_width=320,
    lrp_widths=(224, 128),
)

SMALL = CMambaConfig(
    name="small",
    widths=(64, 96, 128),
    depths=(1, 1, 1),
    latent_channels=192,
    hyper_widths=(256, 128),
    slices=4,
    cae_width=128,
    lrp_widths=(224, 128),
)

# Made to be trained on two CPU cores: convolutions are cheap there and scans are not, so few
# states, half the channels in the scan, and no global path at H/2, with the most positions.
TINY = CMambaConfig(
    name="tiny",
    widths=(32, 64, 96),
    depths=(1, 1, 1),
    ssm_stages=(False, True, True),
    latent_channels=256,
    hyper_widths=(96, 64),
    slices=(32, 32, 32, 32, 64, 64),
    cae_width=96,
    lrp_widths=(96, 64),
    d_state=2,
    ssm_ratio=0.5,
    lrp=False,
    lmbdas=VARIABLE_RATE_LMBDAS,
    bypass=True,
)

CONFIGS = {config.name: config for config in (BASE, SMALL, TINY)}
