"""The scans against independent oracles, their types, memory, determinism and registration."""

import math

import numpy as np
import pytest
import torch
from scan_helpers import BACKENDS, EAGER_BACKENDS, FUSED_BACKENDS

from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.ops.chunked import op, scan
from cmamba_ref.testing import assert_accurate, evaluate, scan_2d_arguments, scan_arguments, worst


def numpy_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx=None):
    """The scan in closed form, without a recurrence: the tests' own oracle.

    h_t = exp(A sum of dt up to t) h_0 + sum over s <= t of exp(A sum of dt in (s, t]) dt_s B_s u_s,
    of packed sequences without h_0 but in the first, and with s from the sequence of t.
    """
    batch, channels, length = u.shape
    number = np.zeros((batch, length), int)  # of the sequence in its row
    if seq_idx is not None:
        number[:, 1:] = np.cumsum(np.diff(seq_idx) != 0, axis=1)
    y, last = np.zeros(u.shape), np.zeros((batch, *A.shape))
    for b in range(batch):
        for d in range(channels):
            dt = [x + (0 if delta_bias is None else delta_bias[d]) for x in delta[b, d]]
            if delta_softplus:
                dt = [math.log1p(math.exp(x)) for x in dt]
            elapsed = np.cumsum(dt)
            for n in range(A.shape[1]):

                def at(M, t, b=b, d=d, n=n):
                    if M.ndim == 2:
                        return M[d, n]
                    if M.ndim == 3:
                        return M[b, n, t]
                    return M[b, d * M.shape[1] // channels, n, t]

                for t in range(length):
                    h = 0.0
                    if initial_state is not None and number[b, t] == 0:
                        h = math.exp(A[d, n] * elapsed[t]) * initial_state[b, d, n]
                    for s in np.flatnonzero(number[b, : t + 1] == number[b, t]):
                        decay = math.exp(A[d, n] * (elapsed[t] - elapsed[s]))
                        h += decay * dt[s] * at(B, s) * u[b, d, s]
                    y[b, d, t] += at(C, t) * h
                    last[b, d, n] = h
    if D is not None:
        y += D[:, None] * u
    if z is not None:
        y *= z / (1 + np.exp(-z))
    return y, last


def as_numpy(arguments):
    return {
        name: x.detach().numpy() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }


FORMS = [
    {"b_form": "varying", "c_form": "varying"},
    {"b_form": "constant", "c_form": "varying", "skip": False},
    {"b_form": "varying", "c_form": "constant", "gate": False},
    {"b_form": "constant", "c_form": "constant", "softplus": False},
    {"b_form": "grouped", "c_form": "grouped", "groups": 3, "bias": False},
    {"b_form": "grouped", "c_form": "varying", "groups": 2, "initial_state": False},
    {"b_form": "constant", "c_form": "grouped", "groups": 6, "bias": False, "softplus": False},
    {"b_form": "varying", "c_form": "varying", "packed": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_scan_equals_the_closed_form(form, backend):
    arguments = scan_arguments(length=9, **form)
    expected_y, expected_last = numpy_scan(**as_numpy(arguments))
    y, last = selective_scan(**arguments, return_last_state=True, backend=backend)
    np.testing.assert_allclose(y.detach(), expected_y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last.detach(), expected_last, rtol=0, atol=1e-12)


def scan_orders(height, width):
    """Positions of the map, raster index, in the order in which each direction visits them."""
    rows = [i * width + j for i in range(height) for j in range(width)]
    columns = [i * width + j for j in range(width) for i in range(height)]
    return rows, columns, rows[::-1], columns[::-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_2d_equals_four_closed_forms(backend):
    arguments = scan_2d_arguments(height=3, width=4, channels=3)
    a = as_numpy(arguments)
    rank, n = a["dt_weight"].shape[2], a["A"].shape[2]
    x = a["x"].reshape(2, 12, 3)
    proj = a["proj"].reshape(2, 12, 4, -1)
    expected = np.zeros_like(x)
    for k, order in enumerate(scan_orders(3, 4)):
        r, B, C = np.split(proj[:, order, k].transpose(0, 2, 1), [rank, rank + n], axis=1)
        y, _ = numpy_scan(
            u=x[:, order].transpose(0, 2, 1),
            delta=np.einsum("dr,brl->bdl", a["dt_weight"][k], r),
            A=a["A"][k],
            B=B,
            C=C,
            D=a["D"][k],
            z=None,
            delta_bias=a["dt_bias"][k],
            delta_softplus=True,
            initial_state=None,
        )
        expected[:, order] += y.transpose(0, 2, 1)
    y = selective_scan_2d(**arguments, backend=backend)
    np.testing.assert_allclose(y.detach().reshape(2, 12, 3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", range(4))
def test_each_direction_is_a_1d_scan_of_the_permuted_sequence(direction, backend):
    height, width, rank, n = 5, 3, 2, 2
    a = scan_2d_arguments(height=height, width=width, rank=rank, n=n, skip=False)
    proj = a["proj"].detach().clone()
    others = [k for k in range(4) if k != direction]
    proj[..., others, rank + n :] = 0  # without C the other directions are silent
    y = selective_scan_2d(**{**a, "proj": proj}, backend=backend)

    order = scan_orders(height, width)[direction]
    r, B, C = proj.flatten(1, 2)[:, order, direction].split((rank, n, n), dim=-1)
    expected = selective_scan(
        a["x"].flatten(1, 2)[:, order].mT,
        (r @ a["dt_weight"][direction].T).mT,
        a["A"][direction],
        B.mT,
        C.mT,
        delta_bias=a["dt_bias"][direction],
        delta_softplus=True,
        backend=backend,
    )
    torch.testing.assert_close(y.flatten(1, 2)[:, order], expected.mT, rtol=0, atol=1e-13)


def test_wrong_traversal_order_is_detected(monkeypatch):
    read = scan.read_direction

    def broken(x, direction, *rest):
        read(x, 1 if direction == 3 else direction, *rest)

    arguments = scan_2d_arguments(dtype=torch.float32)
    assert_accurate("chunked", arguments)
    monkeypatch.setattr(scan, "read_direction", broken)
    with pytest.raises(AssertionError, match="above the bound"):
        assert_accurate("chunked", arguments)


# The chunked backend cuts these into chunks, several blocks and a shorter last block.
LONG = [
    scan_arguments(batch=1, channels=3, length=1500, n=2, dtype=torch.float32),
    scan_arguments(batch=1, channels=2, length=1024, n=1, b_form="constant", dtype=torch.float32),
    scan_arguments(batch=3, channels=96, length=75, n=16, dtype=torch.float32),
    scan_2d_arguments(batch=1, height=37, width=29, channels=2, dtype=torch.float32),
    scan_2d_arguments(batch=4, height=11, width=13, channels=32, n=8, dtype=torch.float32),
    scan_2d_arguments(batch=1, height=1, width=53, channels=160, n=16, dtype=torch.float32),
]


@pytest.mark.parametrize("arguments", LONG, ids=range(len(LONG)))
def test_many_blocks_and_chunks(arguments):
    assert_accurate("chunked", arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [scan_arguments, scan_2d_arguments])
def test_half_precision_inputs_keep_a_single_precision_state(make, dtype):
    arguments = make(dtype=dtype)
    assert_accurate("chunked", arguments)
    if make is scan_arguments:
        _, last = selective_scan(**arguments, return_last_state=True)
        assert last.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [scan_arguments, scan_2d_arguments])
def test_autocast_changes_nothing(make, backend):
    arguments = make(dtype=torch.float32)
    expected = evaluate(arguments, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = evaluate(arguments, backend)
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
@pytest.mark.parametrize("make", [scan_arguments, scan_2d_arguments])
def test_every_backend_is_as_accurate_as_the_reference(make, backend):
    assert_accurate(backend, make())


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
def test_gradcheck(backend):
    a = scan_arguments(batch=1, channels=2, length=4, n=2, b_form="grouped", groups=2)
    names = [name for name, x in a.items() if isinstance(x, torch.Tensor)]

    def scan(*tensors):
        given = {**a, **dict(zip(names, tensors, strict=True))}
        return selective_scan(**given, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, [a[name] for name in names])

    b = scan_2d_arguments(batch=1, height=2, width=3, channels=2, n=2, rank=1)

    def scan_2d(*tensors):
        return selective_scan_2d(*tensors, backend=backend)

    assert torch.autograd.gradcheck(scan_2d, list(b.values()))


def test_gradcheck_across_chunks():
    a = scan_arguments(batch=1, channels=1, length=16, n=1, gate=False)
    names = [name for name, x in a.items() if isinstance(x, torch.Tensor)]

    def scan(*tensors):
        given = {**a, **dict(zip(names, tensors, strict=True))}
        return selective_scan(**given, return_last_state=True, backend="chunked")

    assert torch.autograd.gradcheck(scan, [a[name] for name in names])


@pytest.mark.parametrize("arguments", LONG, ids=range(len(LONG)))
def test_backward_repeats_bit_for_bit(arguments):
    first, second = (evaluate(arguments, "chunked") for _ in range(2))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


@pytest.mark.parametrize("arguments", LONG, ids=range(len(LONG)))
def test_no_uninitialised_memory_is_read(arguments, monkeypatch):
    expected = evaluate(arguments, "chunked")
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(math.nan)
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **kw: empty_like(*args, **kw).fill_(math.nan)
    )
    results = evaluate(arguments, "chunked")
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_unchanged_and_outputs_own_their_memory(backend):
    for arguments in (scan_arguments(), scan_2d_arguments(), scan_arguments(length=1)):
        before = {k: x.clone() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
        results = evaluate(arguments, backend)
        for name, x in before.items():
            assert torch.equal(arguments[name], x), name
        pointers = {arguments[name].data_ptr() for name in before}
        assert results["y"].data_ptr() not in pointers


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_expanded_gradients(backend):
    a = scan_2d_arguments(batch=2, height=5, width=3, channels=4)
    expected = selective_scan_2d(**a, backend=backend)
    expected_grads = torch.autograd.grad(expected.sum(), list(a.values()))
    # Channels first in memory, a batch of every second image, and a gradient of stride 0.
    x = a["x"].detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    proj = a["proj"].detach().repeat_interleave(2, dim=0)[::2]
    strided = {**a, "x": x.requires_grad_(), "proj": proj.requires_grad_()}
    assert not x.is_contiguous() and not proj.is_contiguous()
    y = selective_scan_2d(**strided, backend=backend)
    ones = torch.ones((), dtype=y.dtype).expand_as(y)
    grads = torch.autograd.grad(y, list(strided.values()), ones)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_flows_through_the_last_state_alone(backend):
    a = scan_arguments(gate=False, skip=False)
    _, last = selective_scan(**a, return_last_state=True, backend=backend)
    (grad,) = torch.autograd.grad(last.sum(), a["u"])
    assert worst(grad) > 0


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_second_derivative_is_refused(backend):
    for arguments in (scan_arguments(length=3), scan_2d_arguments(height=2, width=2)):
        scan = selective_scan_2d if "x" in arguments else selective_scan
        wanted = arguments["A"]
        y = scan(**arguments, backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            grad.sum().backward()


def operator_arguments(batch, strided):
    """The two registered operators with arguments, in memory backwards if strided."""
    generator = torch.Generator().manual_seed(0)
    length, groups, channels, n = 20, 2, 3, 2
    sequence = (length, batch, groups, channels)
    of_scan = (
        torch.randn(sequence, generator=generator),
        torch.rand(sequence, generator=generator),
        torch.randn(groups, n, channels, generator=generator),
        torch.randn(length, batch, groups, n, 1, generator=generator),
        torch.randn(1, 1, groups, n, channels, generator=generator),
        torch.randn(batch, groups, n, channels, generator=generator),
        torch.rand(length, batch, generator=generator) < 0.2,
    )
    *of_scan_2d, D = (
        x.detach() for x in scan_2d_arguments(batch=batch, dtype=torch.float32).values()
    )
    of_scan_2d.append(D.sum(0))
    for operator, arguments in (
        (op.chunked_scan, of_scan),
        (op.chunked_scan_2d, of_scan_2d),
    ):
        if strided:
            backwards = [x.permute(*reversed(range(x.dim()))) for x in arguments]
            arguments = [x.contiguous().permute(*reversed(range(x.dim()))) for x in backwards]
        yield operator, (*(x.requires_grad_(x.is_floating_point()) for x in arguments), True)


@pytest.mark.parametrize("make", [scan_arguments, scan_2d_arguments])
def test_the_operator_and_the_function_give_the_same_bits(make, monkeypatch):
    """Compilers see the one, eager code calls the other."""
    scan = selective_scan if make is scan_arguments else selective_scan_2d
    arguments = make(dtype=torch.float32)
    with_gradients, without = [], []
    for is_plain in (True, False):
        monkeypatch.setattr(op, "is_plain", lambda x, answer=is_plain: answer)
        with_gradients.append(evaluate(arguments, "chunked"))
        with torch.no_grad():
            without.append(scan(**arguments, backend="chunked"))
    of_function, of_operator = with_gradients
    assert all(torch.equal(of_operator[name], x) for name, x in of_function.items())
    assert all(torch.equal(y, of_function["y"]) for y in without)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batch", [2, 0])
def test_opcheck(batch, strided):
    for operator, arguments in operator_arguments(batch, strided):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("batch", [2, 0])
def test_operators_return_the_declared_strides(batch):
    (scan, of_scan), (scan_2d, of_scan_2d) = operator_arguments(batch, strided=True)
    with torch.no_grad():
        y, last, starts = scan(*of_scan)
        y_2d, starts_2d = scan_2d(*of_scan_2d)
        grads = op.chunked_scan_backward(y, last, *of_scan[:5], of_scan[6], starts)
        grads_2d = op.chunked_scan_2d_backward(y_2d, *of_scan_2d[:6], starts_2d)
    for x in (y, last, starts, y_2d, starts_2d, *grads, *grads_2d):
        assert x.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [scan_arguments, scan_2d_arguments])
def test_compiles_without_a_graph_break(make, backend):
    torch._dynamo.reset()
    if make is scan_arguments:
        scan, arguments = selective_scan, make(length=4, dtype=torch.float32)
    else:
        scan, arguments = selective_scan_2d, make(height=2, width=3, dtype=torch.float32)

    def call(a):
        return scan(**a, backend=backend)

    inputs = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    expected = call(arguments)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(arguments)
    grads = torch.autograd.grad(y.square().sum(), inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_compiles_for_all_map_sizes_at_once(backend):
    def call(a):
        return selective_scan_2d(**a, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    # Once for static sizes, once for free ones, and once because several chunks are not one.
    for call_number, (height, width) in enumerate(((4, 3), (5, 2), (8, 5), (3, 7), (6, 11))):
        a = scan_2d_arguments(batch=1, height=height, width=width, dtype=torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=call_number > 2):
            torch.testing.assert_close(compiled(a), selective_scan_2d(**a))


class Scan2d(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, x, proj, A, dt_weight, dt_bias):
        return selective_scan_2d(x, proj, A, dt_weight, dt_bias, backend=self.backend)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_exports_with_free_map_sizes(backend):
    a = scan_2d_arguments(batch=1, dtype=torch.float32, skip=False)
    inputs = tuple(x.detach() for x in a.values() if x is not None)
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = {1: height, 2: width}
    program = torch.export.export(
        Scan2d(backend), inputs, dynamic_shapes=(sizes, sizes, None, None, None)
    ).module()
    torch.testing.assert_close(program(*inputs), selective_scan_2d(*inputs))
    a = scan_2d_arguments(batch=1, height=7, width=4, dtype=torch.float32, skip=False)
    others = tuple(x.detach() for x in a.values() if x is not None)
    torch.testing.assert_close(program(*others), selective_scan_2d(*others))


class Scan(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, backend=self.backend)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_exports_the_1d_scan(backend):
    a = scan_arguments(dtype=torch.float32)
    inputs = tuple(a[name].detach() for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(backend), inputs).module()
    torch.testing.assert_close(program(*inputs), Scan("chunked")(*inputs))
