"""The scans under what torch builds on its autograd, on every backend."""

import pytest
import torch
from scan_helpers import BACKENDS, FUSED_BACKENDS
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.testing import scan_2d_arguments, scan_arguments


@pytest.fixture(params=["scan", "scan_2d"])
def tensors_and_scan(request, backend):
    """Small arguments that take a gradient, and the scan as a function of them."""
    if request.param == "scan":
        scan, arguments = selective_scan, scan_arguments(length=5, dtype=torch.float32)
    else:
        scan, arguments = (
            selective_scan_2d,
            scan_2d_arguments(height=2, width=3, dtype=torch.float32),
        )
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    others = {name: x for name, x in arguments.items() if name not in tensors}

    def run(*values):
        return scan(**dict(zip(tensors, values, strict=True)), **others, backend=backend)

    return [x.detach().requires_grad_() for x in tensors.values()], run


def loss_of(y):
    return y.square().sum()


def gradients(tensors, run):
    return torch.autograd.grad(loss_of(run(*tensors)), tensors)


def in_a_checkpoint(tensors, run, *, use_reentrant=False):
    return gradients(tensors, lambda *args: checkpoint(run, *args, use_reentrant=use_reentrant))


def in_a_reentrant_checkpoint(tensors, run):
    loss = loss_of(checkpoint(run, *tensors, use_reentrant=True))
    loss.backward()
    return [x.grad for x in tensors]


def with_tensors_saved_on_the_cpu(tensors, run):
    with save_on_cpu():
        return gradients(tensors, run)


def with_copies_saved(tensors, run):
    with saved_tensors_hooks(torch.clone, torch.clone):
        return gradients(tensors, run)


def twice_through_one_graph(tensors, run):
    loss = loss_of(run(*tensors))
    torch.autograd.grad(loss, tensors, retain_graph=True)
    return torch.autograd.grad(loss, tensors)


def by_torch_func_grad(tensors, run):
    every = tuple(range(len(tensors)))
    return torch.func.grad(lambda *args: loss_of(run(*args)), argnums=every)(*tensors)


def by_torch_func_vjp(tensors, run):
    y, pull_back = torch.func.vjp(run, *tensors)
    return pull_back(2 * y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "way",
    [
        in_a_checkpoint,
        in_a_reentrant_checkpoint,
        with_tensors_saved_on_the_cpu,
        with_copies_saved,
        twice_through_one_graph,
        by_torch_func_grad,
        by_torch_func_vjp,
    ],
)
def test_gradients_are_the_same(tensors_and_scan, way):
    expected = gradients(*tensors_and_scan)
    torch.testing.assert_close(tuple(way(*tensors_and_scan)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_each_sample_by_vmap(tensors_and_scan):
    tensors, run = tensors_and_scan
    u, *others = tensors
    samples = torch.stack([u, 2 * u]).detach()

    def gradient(u):
        return torch.func.grad(lambda u: loss_of(run(u, *others)))(u)

    found = torch.func.vmap(gradient)(samples)
    torch.testing.assert_close(found, torch.stack([gradient(u) for u in samples]))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # in torch's own forward mode
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_what_a_fused_scan_cannot_do_is_refused_by_name(tensors_and_scan, backend):
    tensors, run = tensors_and_scan
    with pytest.raises(NotImplementedError, match="(?i)scan.* no forward-mode .*'reference'"):
        torch.func.jvp(lambda u: run(u, *tensors[1:]), (tensors[0],), (tensors[0],))
    loss = loss_of(run(*tensors))
    (of_u,) = torch.autograd.grad(loss, tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="(?i)scan has no second .*'reference'"):
        of_u.sum().backward()
