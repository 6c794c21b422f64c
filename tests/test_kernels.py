"""The Triton kernels in triton's interpreter: every output and gradient against the fp64 oracle.

All runs here are poisoned: memory that a launch allocates is full of NaN before it is written, and
every argument lies between NaN, so that a wrong mask or index shows.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_helpers import chunks_of, kernels_are_interpreted

import cmamba_ref.ops as ops
from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.testing import (
    assert_accurate,
    evaluate,
    guarded,
    poisoned,
    scan_2d_arguments,
    scan_arguments,
    worst,
)

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not kernels_are_interpreted(), reason="this machine has a GPU: kernels are not interpreted"
    ),
]

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from cmamba_ref import kernels  # noqa: E402  # pyright: ignore[reportAttributeAccessIssue]
from cmamba_ref.kernels import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    is_supported,
    launch,
    op,
    primitives,
    tiling,
)

chunk_lengths = st.sampled_from((4, 8, 16, 32))
carried_together = st.sampled_from((1, 2, 32))
states = st.sampled_from((1, 2, 3, 4, 8, 16))
seeds = st.integers(0, 2**16)
batches = st.sampled_from((1, 1, 1, 2, 3, 0))
single_or_double = st.sampled_from((torch.float32, torch.float32, torch.float64))
# The interpreter takes about a tenth of a second per position of a map.
positions = st.sampled_from((2, 4, 8, 12, 24))


@st.composite
def maps(draw):
    """Arguments of `selective_scan_2d`: odd maps, single rows and columns, uneven blocks."""
    batch = draw(batches)
    most = max(draw(positions) // max(batch, 1), 1)
    height = draw(st.integers(1, most))
    width = draw(st.integers(1, most // height))
    if draw(st.booleans()):
        height, width = width, height
    return scan_2d_arguments(
        draw(seeds),
        batch=batch,
        height=height,
        width=width,
        channels=draw(st.sampled_from((1, 3, 16, 32, 40))),
        n=draw(states),
        rank=draw(st.integers(1, 20)),
        skip=draw(st.booleans()),
        dtype=draw(single_or_double),
    )


@st.composite
def sequences(draw, packed=False):
    """Arguments of `selective_scan`: every form of every argument."""
    batch = draw(batches)
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    forms = st.sampled_from(("constant", "varying", "grouped"))
    return scan_arguments(
        draw(seeds),
        batch=batch,
        channels=groups * draw(st.sampled_from((1, 2, 16, 33))),
        length=draw(st.integers(1, max(draw(positions) // max(batch, 1), 1))),
        n=draw(states),
        b_form=draw(forms),
        c_form=draw(forms),
        groups=groups,
        skip=draw(st.booleans()),
        gate=draw(st.booleans()),
        bias=draw(st.booleans()),
        softplus=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        packed=packed,
        dtype=draw(single_or_double),
    )


@given(maps(), chunk_lengths, carried_together)
def test_scan_2d_is_as_accurate_as_the_reference(arguments, chunk, together):
    with poisoned(), chunks_of(chunk, together):
        assert_accurate("triton", guarded(arguments))


@given(sequences(), chunk_lengths, carried_together)
def test_scan_is_as_accurate_as_the_reference(arguments, chunk, together):
    with poisoned(), chunks_of(chunk, together):
        assert_accurate("triton", guarded(arguments))


@given(sequences(packed=True), chunk_lengths, carried_together)
def test_scan_of_packed_sequences_is_as_accurate_as_the_reference(arguments, chunk, together):
    # A short sequence sums few terms, and now and then the reference rounds hardly at all.
    with poisoned(), chunks_of(chunk, together):
        assert_accurate("triton", guarded(arguments), allowance=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_keep_a_single_precision_state(dtype):
    # The interpreter cuts bf16 off where a GPU rounds, so an output may be one unit further off.
    slack = 2 if dtype == torch.bfloat16 else 1
    for arguments in (
        scan_arguments(batch=1, length=11, dtype=dtype),
        scan_2d_arguments(batch=1, dtype=dtype),
    ):
        with poisoned(), chunks_of(4):
            expected, results = evaluate(arguments, "reference"), evaluate(arguments, "triton")
        for name, x in expected.items():
            assert results[name].dtype == x.dtype, name
            error = worst(results[name].double() - x.double())
            assert error <= slack * torch.finfo(dtype).eps * worst(x), name


def test_one_pass_and_many_chunks_agree():
    a = scan_2d_arguments(batch=1, height=3, width=5, channels=4)
    whole = evaluate(a, "triton")
    for chunk, together in ((4, 2), (8, 32)):
        with chunks_of(chunk, together):
            for name, x in evaluate(a, "triton").items():
                torch.testing.assert_close(x, whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
def test_carry_over_many_chunks(adjoint, packed):
    generator = torch.Generator().manual_seed(0)
    images, directions, chunks, n, channels = 2, 4, 2 * tiling.FIXED.carry_chunks + 5, 3, 7
    shape = (images, directions, chunks, n, channels)
    ends = torch.randn(shape, generator=generator, dtype=torch.float64)
    sums = torch.rand(images, directions, chunks, channels, generator=generator).double()
    A = -torch.rand(directions, n, channels, generator=generator).double()
    first = torch.randn(images, directions, n, channels, generator=generator).double()
    if packed:
        sums[:, :, 3::10] = torch.inf  # a sequence begins in these chunks
    with poisoned():
        starts = launch._carried(ends, sums, A, first, adjoint=adjoint, packed=packed)
    for direction in range(directions):
        order = range(chunks)
        if (direction >= 2) != adjoint:
            order = reversed(order)
        state = first[:, direction]
        for c in order:
            torch.testing.assert_close(starts[:, direction, c], state)
            decay = torch.exp(A[direction] * sums[:, direction, c, None])
            state = decay * state + ends[:, direction, c]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softplus_and_sigmoid_are_accurate_relative_to_themselves(dtype):
    @triton.jit
    def both(x_ptr, softplus_ptr, sigmoid_ptr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        x = tl.load(x_ptr + i)
        tl.store(softplus_ptr + i, primitives.softplus(x))
        tl.store(sigmoid_ptr + i, primitives.sigmoid(x))

    x = torch.linspace(-80, 80, 4096, dtype=dtype)
    softplus, sigmoid = torch.empty_like(x), torch.empty_like(x)
    both[(1,)](x, softplus, sigmoid, SIZE=len(x))
    exact = x.double()
    # torch's softplus gives up at 20 and below fp64's rounding; log1p does not.
    expected = exact.clamp_min(0) + torch.log1p(torch.exp(-exact.abs()))
    # exp(-|x|) magnifies the rounding of x log2(e) by |x|.
    bound = torch.finfo(dtype).eps * (4 + exact.abs())
    assert ((softplus - expected).abs() <= bound * expected).all()
    assert ((sigmoid - torch.sigmoid(exact)).abs() <= bound * torch.sigmoid(exact)).all()


def test_backward_keeps_only_arguments_and_the_states_between_chunks():
    arguments = scan_2d_arguments(batch=1, height=6, width=8, channels=16, n=8)
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), chunks_of(16):
        selective_scan_2d(**arguments, backend="triton")
    given_ = [x.numel() for x in arguments.values()]
    chunks, n, channels = 3, 8, 16
    # Besides: skip [D], the sum of D over the directions.
    assert sum(kept.values()) == sum(given_) - arguments["D"].numel() + channels + (
        4 * chunks * n * channels
    )


def test_kernels_use_no_atomics(root):
    for path in (root / "kernels").glob("*.py"):
        assert "atomic_" not in path.read_text(), path.name


def test_misaligned_arguments_are_copied():
    a = scan_2d_arguments(batch=1, height=2, width=3)
    memory = torch.zeros(a["x"].numel() + 1, dtype=torch.float64)
    memory[1:] = a["x"].detach().flatten()
    x = memory[1:].view(a["x"].shape)
    assert x.data_ptr() % 16
    assert op._prepared(x).data_ptr() % 16 == 0
    torch.testing.assert_close(
        selective_scan_2d(**{**a, "x": x}, backend="triton"),
        selective_scan_2d(**a, backend="reference"),
    )


@pytest.fixture
def capabilities(monkeypatch):
    """Of the GPUs that torch finds; triton's driver starts on them."""
    found = [(9, 0), (8, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", found.__getitem__)
    with_driver(monkeypatch, lambda: None)
    yield found
    kernels._gpu_failure.cache_clear()


def with_driver(monkeypatch, start):
    """Replace triton's driver by one whose start does this."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=start))
    monkeypatch.setattr("triton.runtime.driver", driver)
    kernels._gpu_failure.cache_clear()


def test_an_old_gpu_is_refused_whichever_it_is(capabilities):
    assert kernels.unavailable_reason("cuda") is None
    capabilities.append((7, 5))
    kernels._gpu_failure.cache_clear()
    assert "cuda:2 has 7.5" in kernels.unavailable_reason("cuda")


def test_a_triton_that_cannot_start_is_refused(capabilities, monkeypatch):
    def start():
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    with_driver(monkeypatch, start)
    reason = kernels.unavailable_reason("cuda")
    assert reason == "Triton cannot start: Failed to find C compiler."


def test_too_many_states_or_ranks_are_refused_by_name():
    assert is_supported("cpu", 32, 64)
    assert not is_supported("cpu", 33)
    a = scan_arguments(batch=1, length=2, n=33)
    with pytest.raises(ops.dispatch.BackendUnavailableError, match="N <= 32 states.*got 33"):
        selective_scan(**a, backend="triton")
    b = scan_2d_arguments(batch=1, height=1, width=2, rank=65)
    with pytest.raises(ops.dispatch.BackendUnavailableError, match="R <= 64 columns.*got 65"):
        selective_scan_2d(**b, backend="triton")
