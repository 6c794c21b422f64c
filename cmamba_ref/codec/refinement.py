"""Refinement of y for one image: stochastic Gumbel annealing (SGA, Yang et al. 2020).

The encoder g_a was trained for all images; what it finds for one image can be improved, at the
cost of time, by gradient descent on the loss of that image,

    L(y) = R(y) + lambda 255^2 D(x, g_s(y_bar(y))),

with z fixed. Neither the decoder nor the format knows of it. Rounding has no gradient, and the one
of the identity diverges here. SGA rounds at random in its place, up or down with probabilities that
depend on the distance, and softly, by the Gumbel-softmax trick. Both become sharp as the
temperature falls.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmamba_ref.entropy.dead_zone import dead_zone_slope
from cmamba_ref.entropy.gaussian import is_skipped
from cmamba_ref.entropy.latent_coder import SKIPPED_TABLES, CompressOutput, LatentSymbols
from cmamba_ref.errors import InvalidArgumentError
from cmamba_ref.model import CMamba, pad
from cmamba_ref.ops.autocast import without_autocast

# Gradient steps of the efforts 0...9.  Fewer than 22 often find nothing better than the encoder's
# dead zone, which the search starts without.
STEPS = (0, 22, 27, 32, 38, 45, 64, 90, 110, 250)

# Our choices (docs/benchmarks.md): the rate from crops of training images, the rest from Kodak.
LEARNING_RATE = 0.143  # times the fourth root of lambda, falling to 0
BETAS = (0.8, 0.99)
FIRST_TEMPERATURE = 1.0
TEMPERATURE_DECAY = 2.0  # in the exponent, over all steps

# Larger latents are refined in tiles: positions along one side, and how many around a tile take
# part in the computation, as they are.
TILE = 48
MARGIN = 4

# Pixels along one side of a position of y.
STRIDE = 16

# Called after each step with the number of those done and of all; True ends the search.
Progress = Callable[[int, int], bool | None]


def check_effort(effort: int, model: CMamba) -> int:
    """Return the number of steps of an effort.

    Raises:
        InvalidArgumentError: it is not a whole number from 0 to 9; or it is above 0 for a
            fixed-rate model, or for one that is trained for MS-SSIM.
    """
    is_whole = isinstance(effort, numbers.Integral) and not isinstance(effort, bool)
    if not is_whole or not 0 <= effort < len(STEPS):
        raise InvalidArgumentError(
            f"`effort` must be a whole number from 0 to {len(STEPS) - 1}, got {effort!r}; "
            "0 takes what the network gives"
        )
    if effort and model.gain is None:
        raise InvalidArgumentError(
            f"`effort` must be 0 for {model.config.name!r}: a fixed-rate model does not know the "
            "lambda that it was trained with"
        )
    if effort and model.config.metric != "mse":
        raise InvalidArgumentError(
            f"`effort` must be 0 for {model.config.name!r}: the search lowers the squared error, "
            "and this model is trained for MS-SSIM"
        )
    return STEPS[effort]


class _State(NamedTuple):
    """A latent as a decoder sees it."""

    y: Tensor
    symbols: LatentSymbols
    coded: CompressOutput
    loss: float  # in bits, of the strings as they are
    loss_map: Tensor  # of each position [h, w], in bits, by the Gaussians


def refine(
    model: CMamba,
    x: Tensor,
    quality: float | None,
    steps: int,
    progress: Progress | None = None,
) -> CompressOutput:
    """Find strings for an image that have a lower rate-distortion loss than the encoder's.

    Args:
        model: one that `check_effort` accepts: it knows the lambda of every quality.
        x: image `[1, 3, H, W]` in 0...1.
        quality: as in `CMamba.compress`.
        steps: of gradient descent; of each tile where the latent is large.
        progress: called after each step with the number of those done and of all; if it returns
            True, the search ends with the best found so far.

    Returns:
        The strings, as `CMamba.compress` returns them; the encoder's if nothing better was found.

    Raises:
        CMambaError: as `CMamba.compress`.
    """
    # It takes gradients in fp32, also where its caller wants none, or computes in 16 bits.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(x.device):
        x = x.clone()  # one made in inference mode takes part in no gradients
        problem = _Problem(model, x, quality)
        with torch.no_grad():
            y = model.analyze(x, quality)
            z = model.h_a(y)
        best = problem.state(y, z, problem.slope)
        phi = problem.phi(best.symbols.z)
        y = y.to(phi[0].dtype, copy=True)
        tiles = list(_tiles(*y.shape[2:]))
        done, total = 0, len(tiles) * steps
        for tile in tiles:
            for _ in problem.anneal(y, phi, tile, steps):
                done += 1
                if progress is not None and progress(done, total):
                    return problem.choose(best, y, z, tiles).coded
        return problem.choose(best, y, z, tiles).coded


class _Tile(NamedTuple):
    """Positions of y to refine, and the window around them that is computed."""

    inner: tuple[slice, slice]
    window: tuple[slice, slice]


def _tiles(height: int, width: int) -> Iterator[_Tile]:
    for rows in _parts(height):
        for columns in _parts(width):
            window = _widened(rows, height), _widened(columns, width)
            yield _Tile((rows, columns), window)


def largest_window(height: int, width: int) -> int:
    """Pixels that are computed at a time for a latent of `height` x `width` positions."""
    windows = (tile.window for tile in _tiles(height, width))
    return max((r.stop - r.start) * (c.stop - c.start) for r, c in windows) * STRIDE**2


def _widened(part: slice, size: int) -> slice:
    return slice(max(part.start - MARGIN, 0), min(part.stop + MARGIN, size))


def _parts(size: int) -> Iterator[slice]:
    """Cut a side into equal parts of at most TILE positions, about."""
    count = -(-size // TILE)
    for i in range(count):
        yield slice(i * size // count, (i + 1) * size // count)


class _Problem:
    """The loss of one image at one quality."""

    def __init__(self, model: CMamba, x: Tensor, quality: float | None) -> None:
        assert model.gain is not None
        self.coder = model.latent_coder
        self.model = _without_weight_gradients(model)
        self.quality = model.check_quality(quality)
        lmbda = model.gain.lmbda(torch.tensor([self.quality], device="cpu"))[0]
        self.lmbda, self.slope = float(lmbda), dead_zone_slope(lmbda)
        self.height, self.width = x.shape[2:]
        self.x = pad(x).to(next(model.parameters()).device)

    @torch.no_grad()
    def phi(self, z_symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Phi' of the hyper-latents, in the precision of the weights."""
        z_hat = z_symbols + self.coder.medians()
        return self.model.h_s(z_hat.to(next(self.model.h_s.parameters()).dtype))

    @torch.no_grad()
    def state(self, y: Tensor, z: Tensor, slope: Tensor) -> _State:
        """What a decoder will see of y, and its loss.

        Args:
            slope: of the dead zone, which the encoder's y has and a refined y has not.
        """
        symbols = self.coder.symbols(y, z, slope)
        coded = self.coder.encode(symbols, self.quality)
        x_hat = self.model.reconstruct(symbols.y_bar, torch.tensor([self.quality], device="cpu"))
        x_hat = (255 * x_hat).round() / 255
        bits = [
            _bits(self.model, values, torch.zeros_like(values), log_scales).sum((0, 1))
            for values, log_scales in zip(symbols.y, symbols.log_scales, strict=True)
        ]
        errors = self._squared_error(x_hat, (slice(0, None), slice(0, None)))
        of_positions = errors.unfold(0, STRIDE, STRIDE).unfold(1, STRIDE, STRIDE).sum((2, 3))
        size = 8 * sum(len(string) for strings in coded["strings"] for string in strings)
        loss = size + float(self._weighted(errors.sum()))
        loss_map = torch.stack(bits).sum(0).cpu() + self._weighted(of_positions).cpu()
        return _State(y, symbols, coded, loss, loss_map)

    def anneal(
        self, y: Tensor, phi: tuple[Tensor, Tensor], tile: _Tile, steps: int
    ) -> Iterator[None]:
        """Refine the positions of a tile of y in place, a step at a time."""
        rows, columns = tile.window
        here = (slice(None), slice(None), rows, columns)
        variable, context = y[here].clone(), tuple(part[here] for part in phi)
        variable.requires_grad_()
        inside = torch.zeros(variable.shape[2:], dtype=torch.bool, device=y.device)
        inside[tuple(_shifted(a, b) for a, b in zip(tile.inner, tile.window, strict=True))] = True
        first_lr = LEARNING_RATE * self.lmbda**0.25
        optimiser = torch.optim.Adam([variable], betas=BETAS)
        generator = torch.Generator(y.device).manual_seed(0)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = first_lr * (1 - step / steps)
            temperature = FIRST_TEMPERATURE * math.exp(-TEMPERATURE_DECAY * step / steps)

            def quantise(residual: Tensor, tau: float = temperature) -> Tensor:
                soft = soft_round(residual, tau, generator)
                return torch.where(inside, soft, residual.detach().round())

            loss = self._soft_loss(variable, context, quantise, tile)
            (variable.grad,) = torch.autograd.grad(loss, [variable])  # outside the tile it is 0
            optimiser.step()
            y[here] = variable.detach()
            yield

    def _soft_loss(
        self,
        y: Tensor,
        phi: tuple[Tensor, ...],
        quantise: Callable[[Tensor], Tensor],
        tile: _Tile,
    ) -> Tensor:
        y_slices = y.split(self.model.config.slice_widths, dim=1)
        bits = []

        def code_slice(i: int, means: Tensor, log_scales: Tensor) -> Tensor:
            skipped = is_skipped(log_scales, SKIPPED_TABLES)
            y_hat = torch.where(skipped, means, means + quantise(y_slices[i] - means))
            bits.append(_bits(self.model, y_hat, means, log_scales).sum())
            return y_hat

        y_bar = self.model.context(phi, code_slice)
        x_hat = self.model.synthesize(y_bar, self.quality)
        errors = self._squared_error(x_hat.clamp(0, 1), tile.window)
        return torch.stack(bits).sum() + self._weighted(errors.sum())

    def _squared_error(self, x_hat: Tensor, window: tuple[slice, slice]) -> Tensor:
        """Error of each pixel of a window, summed over colours; 0 in the padding."""
        rows, columns = (slice(STRIDE * (s.start or 0), s.stop and STRIDE * s.stop) for s in window)
        errors = (x_hat.float() - self.x[:, :, rows, columns]).square().sum((0, 1))
        is_padding = torch.zeros(self.x.shape[2:], dtype=torch.bool, device=errors.device)
        is_padding[self.height :] = True
        is_padding[:, self.width :] = True
        return errors.masked_fill(is_padding[rows, columns], 0)

    def _weighted(self, squared_error: Tensor) -> Tensor:
        """A sum of squared errors in bits: of colours that count a third of a pixel each."""
        return self.lmbda * 255**2 / 3 * squared_error

    def choose(self, best: _State, y: Tensor, z: Tensor, tiles: list[_Tile]) -> _State:
        """The better of a state and of y, tile by tile as far as that lowers the whole loss."""
        slope = torch.zeros(y.shape[2:], device="cpu")
        found = self.state(y, z, slope)
        worse = [t for t in tiles if found.loss_map[t.inner].sum() > best.loss_map[t.inner].sum()]
        candidates = [found]
        if 0 < len(worse) < len(tiles):
            y = y.clone()
            for tile in worse:
                here = (slice(None), slice(None), *tile.inner)
                y[here] = best.y[here]
                slope[tile.inner] = self.slope
            candidates.append(self.state(y, z, slope))
        return min(best, *candidates, key=lambda state: state.loss)


def soft_round(values: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Round softly and at random (SGA, Yang et al. 2020).

    The probabilities of the two neighbours are proportional to exp(-atanh(distance) / temperature);
    a sample of the Gumbel-softmax distribution at the same temperature weighs them.

    Returns:
        a tensor like `values`, each between its floor and the next whole number.
    """
    low = values.detach().floor()
    up = (values - low).clamp(1e-4, 1 - 1e-4)  # distance from the lower neighbour
    logit = (torch.atanh(up) - torch.atanh(1 - up)) / temperature
    uniform = torch.empty_like(logit).uniform_(1e-6, 1 - 1e-6, generator=generator)
    # The difference of two Gumbel variables is logistic.
    return low + torch.sigmoid((logit + torch.logit(uniform)) / temperature)


def _bits(model: CMamba, y_hat: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Information of each element of a slice; 0 where it is not coded."""
    likelihood = model.gaussian_conditional.likelihood(y_hat, means, log_scales)
    return -torch.log2(likelihood).masked_fill(is_skipped(log_scales, SKIPPED_TABLES), 0)


def _shifted(part: slice, window: slice) -> slice:
    return slice(part.start - window.start, part.stop - window.start)


def _without_weight_gradients(model: CMamba) -> CMamba:
    """A copy of the model that shares its weights and computes no gradients for them."""
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    shared[id(model._float64_path)] = model._float64_path
    return copy.deepcopy(model, shared)
