"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (Vyas et al. 2024, arXiv 2409.11321).

For every axis of a weight, SOAP averages the covariance of the gradient along that axis and keeps
an orthonormal basis of its eigenvectors.  Adam then runs on the gradient in these bases:

    G_k  <- beta G_k + (1 - beta) g_(k) g_(k)^T        covariance along axis k
    Q_k  <- QR(G_k Q_k)                                one power iteration, every few steps
    g'    = g x_1 Q_1^T x_2 Q_2^T ...                  rotated gradient
    w    <- w - lr * (Adam's step for g') rotated back

Our choices: the two spatial axes of a convolution count as one; an axis of one entry, or of more
than `max_size`, has no basis; vectors are left to plain Adam.  The paper leaves out the first step,
which has no basis yet; weights with bases leave out the first `every` steps here, so that the first
basis is made of several gradients: one alone says nothing of most directions of a wide layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """SOAP for weights on one device.

    Args:
        params: the weights; of several processes that divide the work, those of this one.
        lr: learning rate; with 0 a step gathers statistics and changes no weight.
        betas: decay of the first and of the second moment; covariances decay as the second.
        eps: added to the root of the second moment.
        every: steps between updates of the bases.
        max_size: largest axis that gets a basis.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        every: int = 10,
        max_size: int = 1024,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.every, self.max_size = every, max_size

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:  # type: ignore[override]
        """Take one step, or change nothing where `finite`, a boolean scalar, is false.

        The host does the same work either way, so that it need not wait for a GPU to know.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group, finite)

    def _step(self, parameter: Tensor, group: dict[str, Any], finite: Tensor) -> None:
        gradient = torch.where(finite, _as_matrix(parameter.grad), 0.0)  # type: ignore[arg-type]
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(gradient))
        axes = [axis for axis in range(gradient.ndim) if f"basis{axis}" in state]
        beta1, beta2 = group["betas"]
        # Weights of what is new in an average; a weight of 0 leaves it as it is.
        taken = finite.to(gradient.dtype)
        new1, new2 = taken * (1 - beta1), taken * (1 - beta2)

        state["round"] += 1  # on the host, with steps that were not finite
        number = int(state["round"])
        if number > self.every or not axes:
            step, moment1, moment2 = state["step"], state["exp_avg"], state["exp_avg_sq"]
            rotated = gradient
            for axis in axes:
                rotated = _rotate(rotated, state[f"basis{axis}"], axis)
            step += taken
            moment1.lerp_(rotated, new1)
            moment2.lerp_(rotated.square(), new2)
            # `step` may still be 0; the moments then are 0 as well.
            correction1, correction2 = (1 - beta ** step.clamp(min=1) for beta in (beta1, beta2))
            change = (moment1 / correction1) / ((moment2 / correction2).sqrt_() + group["eps"])
            for axis in axes:
                change = _rotate(change, state[f"basis{axis}"].T, axis)
            parameter.sub_(_as_weight(change * (taken * group["lr"]), parameter.shape))

        for axis in axes:
            state[f"covariance{axis}"].lerp_(_covariance(gradient, axis), new2)
        if number == self.every:
            for axis in axes:
                state[f"basis{axis}"].copy_(_eigenvectors(state[f"covariance{axis}"]))
        elif number % self.every == 0:
            for axis in axes:
                self._update_basis(state, axis)

    def _new_state(self, gradient: Tensor) -> dict[str, Tensor]:
        state = {
            "round": torch.zeros((), dtype=torch.int64),
            "step": gradient.new_zeros(()),
            "exp_avg": torch.zeros_like(gradient),
            "exp_avg_sq": torch.zeros_like(gradient),
        }
        for axis, size in enumerate(gradient.shape):
            if gradient.ndim > 1 and 1 < size <= self.max_size:
                state[f"covariance{axis}"] = gradient.new_zeros(size, size)
                state[f"basis{axis}"] = torch.eye(size).to(gradient)
        return state

    def _update_basis(self, state: dict[str, Tensor], axis: int) -> None:
        """One power iteration with QR, eigenvalues in falling order; the moments go along."""
        covariance, basis = state[f"covariance{axis}"], state[f"basis{axis}"]
        product = covariance @ basis
        order = (basis * product).sum(0).argsort(descending=True)
        renewed = torch.linalg.qr(product[:, order])[0]
        # The second moment knows no rotation: its entries keep their eigenvectors' ranks.
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].index_select(axis, order))
        state["exp_avg"].copy_(_rotate(state["exp_avg"], basis.T @ renewed, axis))
        basis.copy_(renewed)


def work(shape: Sequence[int], every: int = 10, max_size: int = 1024) -> float:
    """About how many multiplications a step of SOAP takes for a weight of that shape."""
    rows = torch.empty(shape, device="meta")
    entries, axes = rows.numel(), _as_matrix(rows).shape
    sizes = [size for size in axes if len(axes) > 1 and 1 < size <= max_size]
    return 16 * entries + sum(3 * entries * size + 4 * size**3 / every for size in sizes)


def _as_matrix(weight: Tensor) -> Tensor:
    """A weight with its spatial axes as one: `[O, I, k, l]` as `[O, kl, I]`, others as they are."""
    return weight.permute(0, 2, 3, 1).flatten(1, 2) if weight.ndim == 4 else weight


def _as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_as_matrix`."""
    if len(shape) != 4:
        return matrix
    return matrix.unflatten(1, shape[2:]).permute(0, 3, 1, 2)


def _rotate(x: Tensor, basis: Tensor, axis: int) -> Tensor:
    """Coordinates of x along an axis in the basis of these columns."""
    if axis == x.ndim - 1:
        return x @ basis
    return (basis.T @ x.flatten(axis + 1)).unflatten(-1, x.shape[axis + 1 :])


def _covariance(x: Tensor, axis: int) -> Tensor:
    rows = x.movedim(axis, 0).flatten(1)
    return rows @ rows.T


def _eigenvectors(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, of falling eigenvalues."""
    return torch.linalg.eigh(covariance.double())[1].flip(1).to(covariance)
