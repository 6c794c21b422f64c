"""SOAP against its definition, and its place in the trainer."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmamba_ref.training import soap
from cmamba_ref.training.soap import SOAP, work

YES = torch.tensor(True)


def literal_soap(weight: Tensor, gradients: list[Tensor], lr: float, every: int) -> Tensor:
    """SOAP of a matrix, written from the paper's algorithm in float64, both sides rotated."""
    beta, eps = 0.95, 1e-8
    left = right = left_basis = right_basis = moment1 = moment2 = torch.zeros(())
    for number, gradient in enumerate(gradients):
        if number >= every:
            steps = number - every + 1
            rotated = left_basis.T @ gradient @ right_basis
            # The first moment lives in the weight's own coordinates.
            moment1 = beta * moment1 + (1 - beta) * gradient
            moment2 = beta * moment2 + (1 - beta) * rotated**2
            mean = left_basis.T @ moment1 @ right_basis / (1 - beta**steps)
            step = mean / ((moment2 / (1 - beta**steps)).sqrt() + eps)
            weight = weight - lr * left_basis @ step @ right_basis.T
        left = beta * left + (1 - beta) * gradient @ gradient.T
        right = beta * right + (1 - beta) * gradient.T @ gradient
        if number + 1 == every:
            left_basis = torch.linalg.eigh(left)[1].flip(1)
            right_basis = torch.linalg.eigh(right)[1].flip(1)
        elif (number + 1) % every == 0:
            order = (left_basis * (left @ left_basis)).sum(0).argsort(descending=True)
            left_basis = torch.linalg.qr(left @ left_basis[:, order])[0]
            moment2 = moment2[order]
            order = (right_basis * (right @ right_basis)).sum(0).argsort(descending=True)
            right_basis = torch.linalg.qr(right @ right_basis[:, order])[0]
            moment2 = moment2[:, order]
    return weight


def run(weight: Tensor, gradients: list[Tensor], **options) -> tuple[Tensor, SOAP]:
    parameter = torch.nn.Parameter(weight.clone())
    optimiser = SOAP([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient
        optimiser.step(YES)
    return parameter.detach(), optimiser


def test_matches_the_algorithm():
    generator = torch.Generator().manual_seed(0)
    # Square: full rank from the first gradient on, or the basis of the null space is anybody's.
    weight, *gradients = torch.randn(26, 6, 6, generator=generator, dtype=torch.float64)
    expected = literal_soap(weight, gradients, lr=0.01, every=4)
    found, _ = run(weight, gradients, lr=0.01, every=4)
    assert (found - expected).abs().max() < 1e-9
    assert (found - weight).abs().max() > 0.05


def test_convolutions_are_rotated_along_three_axes():
    """The gradient of a convolution, turned along all axes, takes turned steps."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gradients = [draw(4, 5, 3, 3) for _ in range(30)]
    turns = [torch.linalg.qr(draw(n, n))[0] for n in (4, 5, 9)]

    def turned(x: Tensor) -> Tensor:
        flat = torch.einsum("oik,ao,bi,ck->abc", x.flatten(2), *turns)
        return flat.unflatten(2, (3, 3))

    plain, _ = run(torch.zeros(4, 5, 3, 3).double(), gradients, lr=0.01)
    other, _ = run(torch.zeros(4, 5, 3, 3).double(), [turned(g) for g in gradients], lr=0.01)
    assert (turned(plain) - other).abs().max() < 1e-7
    assert plain.abs().max() > 0.05


@pytest.mark.parametrize("shape", [(7,), (), (5, 1), (1, 3, 3, 3), (4, 6, 2), (3, 2000)])
def test_shapes_of_all_weights(shape):
    """Also axes of one entry, and axes that are too long for a basis."""
    target = torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).view(shape)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimiser = SOAP([parameter], lr=0.02)
    for _ in range(200):
        parameter.grad = parameter.detach() - target
        optimiser.step(YES)
    assert (parameter - target).abs().max() < 0.1
    bases = [name for name in optimiser.state[parameter] if name.startswith("basis")]
    assert ("basis1" in bases) == (shape in ((1, 3, 3, 3), (4, 6, 2)))
    assert work(shape) > 0


def test_ill_conditioned_problems_are_solved_better_than_by_adam():
    """A noisy quadratic whose axes are not those of the weights: what the rotation is for."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator))[0]
    curvature = basis @ torch.diag(torch.logspace(-3, 0, 20)) @ basis.T
    start, *noise = torch.randn(401, 20, 12, generator=generator)
    losses = {}
    for name in ("soap", "adam"):
        weight = torch.nn.Parameter(start.clone())
        rotated, plain = SOAP([weight]), torch.optim.Adam([weight], betas=(0.95, 0.95))
        for number, drawn in enumerate(noise):
            for group in (*rotated.param_groups, *plain.param_groups):
                group["lr"] = 0.03 * (1 - number / len(noise))
            weight.grad = curvature @ (weight.detach() + 0.1 * drawn)
            rotated.step(YES) if name == "soap" else plain.step()
        found = weight.detach()
        losses[name] = float((found * (curvature @ found)).sum())
    assert losses["soap"] < 0.25 * losses["adam"]


def test_a_rate_of_0_gathers_and_changes_nothing():
    gradients = list(torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(3)))
    found, optimiser = run(torch.ones(4, 5), gradients, lr=0.0)
    assert torch.equal(found, torch.ones(4, 5))
    state = next(iter(optimiser.state.values()))
    assert state["covariance0"].abs().sum() > 0 and state["exp_avg_sq"].min() > 0


def test_nonfinite_steps_change_nothing():
    gradients = list(torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(4)))
    plain, _ = run(torch.ones(4, 5), gradients, every=5)
    assert not torch.equal(plain, torch.ones(4, 5))
    parameter = torch.nn.Parameter(torch.ones(4, 5))
    optimiser = SOAP([parameter], every=5)
    # No basis falls due where steps are left out, so the other steps meet the same bases.
    broken = torch.full((4, 5), torch.nan)
    for gradient in (*gradients[:6], broken, broken, gradients[6]):
        parameter.grad = gradient
        optimiser.step(torch.tensor(bool(gradient.isfinite().all())))
    assert torch.equal(parameter, plain)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_more_weights_take_more_matrix_products_only():
    """A GPU's host cannot afford a call for each weight."""
    counts = []
    for number in (2, 9):
        weights = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(number)]
        weights += [torch.nn.Parameter(torch.zeros(5)) for _ in range(number)]
        optimiser = SOAP(weights, every=2)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            with Calls() as calls:
                optimiser.step(YES)
        counts.append(calls.count)
    few, many = counts
    views = {"aten::view", "aten::t", "aten::permute", "aten::expand", "aten::alias"}
    views |= {"aten::transpose.int", "aten::_unsafe_view", "aten::_local_scalar_dense"}
    grown = {name for name, count in many.items() if count > few[name]}
    assert grown - views == {"aten::mm"}


def test_work_counts_rotated_axes():
    assert work((8,)) < work((8, 8)) < work((64, 64)) < work((64, 64, 3, 3))
    # An axis without a basis costs nothing of its own.
    assert work((64, 4096)) < work((64, 1024)) * 4
    assert soap.work((2, 3, 3, 3), every=1) > soap.work((2, 3, 3, 3), every=1000)
