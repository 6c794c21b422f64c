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

from cmamba_ref.training.averages import move

aten = torch.ops.aten


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
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = _finite_gradients(parameters, finite)
            states = [self._state_of(*both) for both in zip(parameters, gradients, strict=True)]
            # On the host, with steps that were not finite.
            aten._foreach_add_.Scalar([state["round"] for state in states], 1)
            # Weights that have taken the same steps are changed in calls of all of them: a call for
            # each of hundreds of small weights takes the host of a GPU longer than all the rest.
            alike: dict[tuple[int, bool], list[_Weight]] = {}
            for weight in map(_Weight, parameters, gradients, states):
                key = int(weight.state["round"]), bool(weight.axes)
                alike.setdefault(key, []).append(weight)
            for (number, has_bases), weights in alike.items():
                if number > self.every or not has_bases:
                    self._change(weights, group, finite)
                if has_bases:
                    self._gather(weights, group, finite, number)

    def _change(self, weights: list[_Weight], group: dict[str, Any], finite: Tensor) -> None:
        """Adam's step in the bases."""
        rotated = [weight.rotated(weight.gradient) for weight in weights]
        states = [weight.state for weight in weights]
        steps, moments1, moments2 = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        taken = finite.to(steps[0].dtype)
        beta1, beta2 = group["betas"]
        aten._foreach_add_.Tensor(steps, taken)
        # A weight of 0 leaves an average as it is.
        move(moments1, rotated, taken * (1 - beta1))
        move(moments2, aten._foreach_mul.List(rotated, rotated), taken * (1 - beta2))
        # `step` may still be 0; the moments then are 0 as well.
        correction1, correction2 = (1 - beta ** steps[0].clamp(min=1) for beta in (beta1, beta2))
        roots = aten._foreach_div.Tensor(moments2, correction2)
        aten._foreach_sqrt_(roots)
        aten._foreach_add_.Scalar(roots, group["eps"])
        change = aten._foreach_div.Tensor(moments1, correction1)
        aten._foreach_div_.List(change, roots)
        change = [w.rotated(x, back=True) for w, x in zip(weights, change, strict=True)]
        aten._foreach_mul_.Tensor(change, taken * group["lr"])
        parameters = [weight.parameter for weight in weights]
        changes = [_as_weight(x, p.shape) for x, p in zip(change, parameters, strict=True)]
        aten._foreach_sub_.List(parameters, changes)

    def _gather(
        self, weights: list[_Weight], group: dict[str, Any], finite: Tensor, number: int
    ) -> None:
        """Covariances, and in every `every`-th step the bases."""
        places = [(weight, axis) for weight in weights for axis in weight.axes]
        averages = [weight.state[f"covariance{axis}"] for weight, axis in places]
        new = [_covariance(weight.gradient, axis) for weight, axis in places]
        move(averages, new, finite.to(averages[0].dtype) * (1 - group["betas"][1]))
        for weight, axis in places:
            if number == self.every:
                covariance = weight.state[f"covariance{axis}"]
                weight.state[f"basis{axis}"].copy_(_eigenvectors(covariance))
            elif number % self.every == 0:
                self._update_basis(weight.state, axis)

    def _state_of(self, parameter: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """The state of a weight; a new one is that of no steps.

        Args:
            gradient: as a matrix, see `_as_matrix`.
        """
        state = self.state[parameter]
        if state:
            return state
        state |= {
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


class _Weight:
    """One weight in a step.

    Attributes:
        parameter: the weight, with whatever axes it has.
        gradient: of the weight as a matrix, see `_as_matrix`.
        state: of the optimiser.
        axes: of the matrix, those that have a basis.
    """

    def __init__(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        self.parameter, self.gradient, self.state = parameter, gradient, state
        self.axes = [axis for axis in range(gradient.ndim) if f"basis{axis}" in state]

    def rotated(self, x: Tensor, back: bool = False) -> Tensor:
        """x, of the form of the matrix, in the bases, or back out of them."""
        for axis in self.axes:
            basis = self.state[f"basis{axis}"]
            x = _rotate(x, basis.T if back else basis, axis)
        return x


def _finite_gradients(parameters: list[Tensor], finite: Tensor) -> list[Tensor]:
    """The gradients as matrices; zeros where `finite` is false."""
    matrices = [_as_matrix(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
    joined = torch.cat([matrix.flatten() for matrix in matrices])
    pieces = torch.where(finite, joined, 0.0).split([matrix.numel() for matrix in matrices])
    return [piece.view(matrix.shape) for piece, matrix in zip(pieces, matrices, strict=True)]


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
