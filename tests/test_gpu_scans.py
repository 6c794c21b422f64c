"""The scans of the backend `triton` on a GPU; every test here skips without a CUDA device.

What the interpreter cannot show: what the compiler makes of the kernels, real sizes, memory, CUDA
graphs and streams. The rule is that of CONTRIBUTING.md. At real sizes the chunked backend judges in
place of the reference, whose loop over positions would take minutes there.
"""

import contextlib
import gc
import json
import logging
import math
import os
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scan_helpers import record_backends
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cmamba_ref.ops as ops
from cmamba_ref import BackendUnavailableError, CMamba
from cmamba_ref.config import CONFIGS
from cmamba_ref.losses import rate_distortion_loss
from cmamba_ref.ops import dispatch, selective_scan, selective_scan_2d
from cmamba_ref.testing import (
    GUARD,
    AccuracyRule,
    accuracy,
    evaluate,
    guarded,
    require_gradients,
    scan_2d_arguments,
    scan_arguments,
    to_double,
    worst,
)

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from cmamba_ref.kernels import (  # pyright: ignore[reportMissingImports]
    backend,
    launch,
    op,
    primitives,
    tiling,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
IMAGE = Path(ops.__file__).parents[1] / "data" / "coffee.png"

# cuBLAS refuses to run under torch.use_deterministic_algorithms(True) without this, and reads it
# only once.
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def on_device(arguments, device=None):
    """The same arguments as leaves on the device under test."""
    device = device or DEVICE
    return require_gradients(
        {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    )


def tensors_of(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def scan_of(arguments):
    return selective_scan_2d if "proj" in arguments else selective_scan


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def assert_equal(results, expected):
    for result, x in zip(results, expected, strict=True):
        assert torch.equal(result, x)


def checked(rule):
    """Checks a rule, and appends its margins to the file that CMAMBA_MARGINS names.

    At once, so that a run that is cut off has them too.
    """
    for margin in rule.margins():
        print(f"{margin.name}: error {margin.error:.3g}, bound {margin.bound:.3g}")
        if path := os.environ.get("CMAMBA_MARGINS"):
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"test": test, **margin._asdict()}) + "\n")
    rule.check()


def assert_as_accurate_as(judge, arguments):
    """The rule for outputs and every gradient; `judge` is the backend that gives O and R."""
    checked(accuracy("triton", arguments, judge))


def plan_of(arguments):
    """How the kernels cut these arguments."""
    A = arguments["A"]
    if "proj" in arguments:
        batch, height, width, channels = arguments["x"].shape
        rank = arguments["dt_weight"].shape[2]
        return tiling.plan(batch, height * width, channels, 1, A.shape[2], rank, A.dtype)
    batch, channels, length = arguments["u"].shape
    groups = max(x.shape[1] if x.dim() == 4 else 1 for x in (arguments["B"], arguments["C"]))
    return tiling.plan(batch, length, channels, groups, A.shape[1], 0, A.dtype)


# Accuracy on small inputs, against the reference.

FLOAT64, FLOAT32 = torch.float64, torch.float32
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


def named(name, dtype, *before):
    """A parameter of a test: `before`, or else the name, and a type; with an id to be read."""
    return pytest.param(*(before or (name,)), dtype, id=f"{name}-{str(dtype).split('.')[1]}")


# Every N up to the largest, R from 1 to the largest, channels that fill no block, single lines.
MAPS = {
    "N1-R1": dict(height=5, width=3, channels=1, n=1, rank=1),
    "N2-R4": dict(height=7, width=9, channels=32, n=2, rank=4),
    "N3-R5": dict(height=1, width=37, channels=40, n=3, rank=5),
    "N4-R2": dict(height=13, width=5, channels=128, n=4, rank=2, skip=False),
    "N8-R3": dict(height=9, width=8, channels=96, n=8, rank=3),
    "N16-R12": dict(height=9, width=11, channels=192, n=16, rank=12),
    "N16-R20": dict(height=37, width=1, channels=130, n=16, rank=20),
    "N32-R64": dict(height=6, width=7, channels=50, n=32, rank=64),
    "N32-R33": dict(height=4, width=11, channels=17, n=32, rank=33, skip=False),
}
MAPS_AND_TYPES = [
    *(named(name, FLOAT32) for name in MAPS),
    *(named(name, FLOAT64) for name in ("N1-R1", "N3-R5", "N16-R12", "N32-R64")),
    *(named(name, BFLOAT16) for name in ("N2-R4", "N3-R5", "N16-R12")),
    *(named(name, FLOAT16) for name in ("N4-R2", "N16-R12")),
]
# Every form of every argument; each is a kernel of its own.
CONSTANT = dict(b_form="constant", c_form="constant")
GROUPED = dict(b_form="grouped", c_form="grouped")
SEQUENCES = {
    "varying": dict(n=4, channels=6),
    "B-constant": dict(b_form="constant", skip=False, n=1, channels=40),
    "C-constant": dict(c_form="constant", gate=False, n=3, channels=130),
    "both-constant": dict(CONSTANT, softplus=False, n=16, channels=33),
    "grouped": dict(GROUPED, groups=3, bias=False, n=8, channels=48),
    "B-grouped": dict(b_form="grouped", groups=2, initial_state=False, n=2, channels=64),
    "group-per-channel": dict(
        GROUPED, b_form="constant", groups=6, bias=False, softplus=False, n=32, channels=6
    ),
}
SEQUENCES_AND_TYPES = [
    *(named(name, FLOAT32) for name in SEQUENCES),
    *(named(name, FLOAT64) for name in ("varying", "both-constant")),
    *(named(name, BFLOAT16) for name in ("varying", "grouped")),
    *(named(name, FLOAT16) for name in ("B-constant", "C-constant")),
]
LENGTH = 75  # two chunks and a shorter last one


def small_map(name="N16-R12", dtype=FLOAT32, **more):
    return on_device(scan_2d_arguments(**{**MAPS[name], **more}, dtype=dtype))


def small_sequence(name="varying", dtype=FLOAT32, **more):
    sizes = {"length": LENGTH, **SEQUENCES[name], **more}
    return on_device(scan_arguments(**sizes, dtype=dtype))


MAKERS = pytest.mark.parametrize("make", [small_map, small_sequence])


ALL_MAPS = pytest.mark.parametrize("name, dtype", MAPS_AND_TYPES)
ALL_SEQUENCES = pytest.mark.parametrize("name, dtype", SEQUENCES_AND_TYPES)


@ALL_MAPS
def test_maps_are_as_accurate_as_the_reference(name, dtype):
    assert_as_accurate_as("reference", small_map(name, dtype))


@ALL_SEQUENCES
def test_sequences_are_as_accurate_as_the_reference(name, dtype):
    assert_as_accurate_as("reference", small_sequence(name, dtype))


@MAKERS
def test_empty_batches(make):
    assert_as_accurate_as("reference", make(batch=0))


@pytest.mark.parametrize(
    "make, sizes",
    [(small_map, {"name": "N2-R4", "height": 65, "width": 64}), (small_sequence, {"length": 2100})],
)
def test_more_chunks_than_one_pass_of_the_carry_takes(make, sizes):
    arguments = make(**sizes, batch=1)
    assert plan_of(arguments).chunks > tiling.FIXED.carry_chunks
    assert_as_accurate_as("reference", arguments)


def test_a_large_batch_is_scanned_in_one_chunk():
    arguments = small_map("N2-R4", batch=4096, height=8, width=5)
    assert plan_of(arguments).chunks == 1
    assert_as_accurate_as("reference", arguments)


@triton.jit
def _softplus_and_sigmoid(x_ptr, softplus_ptr, sigmoid_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(softplus_ptr + i, primitives.softplus(x))
    tl.store(sigmoid_ptr + i, primitives.sigmoid(x))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_softplus_and_sigmoid_are_accurate_relative_to_themselves(dtype):
    x = torch.linspace(-80, 80, 4096, dtype=dtype, device=DEVICE)
    softplus, sigmoid = torch.empty_like(x), torch.empty_like(x)
    _softplus_and_sigmoid[(1,)](x, softplus, sigmoid, SIZE=len(x))
    exact = x.double()
    expected = exact.clamp_min(0) + torch.log1p(torch.exp(-exact.abs()))
    # exp(-|x|) magnifies the rounding of x log2(e) by |x|. The hardware's exp2 and division are off
    # by up to two units each, the sums and products after them by half a unit each.
    bound = torch.finfo(dtype).eps * (8 + exact.abs())
    assert ((softplus - expected).abs() <= bound * expected).all()
    assert ((sigmoid - torch.sigmoid(exact)).abs() <= bound * torch.sigmoid(exact)).all()


# Accuracy at real sizes, against the chunked backend.

SIDE = 256  # of an image


def model_shapes():
    """Every scan of every configuration on an image: those of the stages, and of the CAE."""
    for config in CONFIGS.values():
        stages = zip(config.widths, config.stages_with_scan, strict=True)
        for k, (width, has_scan) in enumerate(stages):
            if has_scan:
                types = (FLOAT32, BFLOAT16)
                yield from shape_of(config, width, SIDE >> (k + 1), f"stage{k + 1}", types)
        assert config.cae_width is not None
        # Trained in fp32, and run in fp64 when it codes.
        yield from shape_of(config, config.cae_width, SIDE >> 4, "cae", (FLOAT32, FLOAT64))


def shape_of(config, width, side, where, types):
    """Parameters of a test: the scan inside an SS2D of these channels."""
    sizes = {
        "height": side,
        "width": side,
        "channels": round(config.ssm_ratio * width),
        "n": config.d_state,
        "rank": math.ceil(width / 16),
    }
    return [named(f"{config.name}-{where}", dtype, sizes) for dtype in types]


@pytest.mark.parametrize("sizes, dtype", list(model_shapes()))
def test_scans_of_the_model_are_as_accurate_as_the_chunked_ones(sizes, dtype):
    arguments = on_device(scan_2d_arguments(batch=1, **sizes, dtype=dtype))
    assert_as_accurate_as("chunked", arguments)


def test_98304_positions_are_as_accurate_as_the_chunked_scan():
    sizes = {"height": 256, "width": 384, "channels": 128, "n": 16, "rank": 12}
    arguments = on_device(scan_2d_arguments(batch=1, **sizes, dtype=FLOAT32))
    assert_as_accurate_as("chunked", arguments)


# Memory.


def buffer_bytes(batch, height, width, channels, n, rank, dtype):
    """Bytes of everything that launch.py allocates for a map, as if all were alive at once.

    That is an upper bound of the peak of forward and backward beyond arguments and grad_y.
    """
    real = torch.promote_types(dtype, FLOAT32)
    cut = tiling.plan(batch, height * width, channels, 1, n, rank, real)
    blocks = tiling.block_count(channels, cut.backward_block)
    chunk = min(cut.chunk_length, height * width)
    checkpoints = tiling.block_count(chunk, tiling.FIXED.recompute_steps)  # of a chunk
    positions = batch * height * width
    elements = positions * channels
    columns = rank + 2 * n
    states = 4 * batch * cut.chunks * n * channels  # between chunks
    per_chunk = 4 * batch * cut.chunks * channels
    small = 4 * channels * (n + rank + 2) + batch * 4 * n * channels
    in_compute_type = (
        states  # starts, kept by the forward
        + 2 * states + per_chunk  # adjoints: ends and starts of the carry, and sums of dt
        + batch * cut.chunks * checkpoints * n * channels
        + states + 2 * per_chunk  # gradients of A, dt_bias and skip, by chunk
        + 2 * (blocks + 1) * 2 * positions * n  # of B and C, by block; their sums, of a pair
        + 2 * elements  # before softplus, of a pair
        + 2 * positions * (2 * rank + columns)  # of a pair: r, its gradient, all columns
        + 2 * batch * height * rank * channels  # of a pair: gradient of dt_weight by line
        + (0 if real == dtype else elements)  # sum over directions, of y and then of grad_x
        + 8 * small  # parameters and states of a whole image, as copied and as gradients
    )  # fmt: skip
    in_io_type = (
        2 * elements  # y and grad_x
        + 4 * positions * columns  # grad_proj
        + 2 * positions * columns  # of a pair
    )
    return in_compute_type * real.itemsize + in_io_type * dtype.itemsize


# As docs/kernels.md has it.
MEASURED = {"batch": 1, "height": 128, "width": 128, "channels": 192, "n": 16, "rank": 12}


WORKSPACE = 32 * 2**20  # bytes that cuBLAS may take for a matrix product


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_peak_memory_is_that_of_the_buffers(dtype):
    arguments = on_device(scan_2d_arguments(**MEASURED, dtype=dtype))
    inputs = list(tensors_of(arguments).values())
    grad_y = torch.randn_like(arguments["x"])

    def run():
        torch.autograd.grad(selective_scan_2d(**arguments, backend="triton"), inputs, grad_y)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # The sizes requested, before the allocator rounds them up.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    bound = buffer_bytes(**MEASURED, dtype=dtype)
    print(f"peak {peak / 2**20:.1f} MiB, bound {bound / 2**20:.1f} MiB")
    assert peak <= bound + WORKSPACE


class Largest(TorchDispatchMode):
    """Elements of the largest memory behind any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, size)
        return result


def test_no_tensor_holds_the_states_of_all_positions(sizes=MEASURED):
    arguments = on_device(scan_2d_arguments(**sizes, dtype=FLOAT32))
    x, proj, A, dt_weight, dt_bias, D = (x.detach() for x in arguments.values())
    tensors = (x, proj, None, None, None, A.mT, dt_weight.mT, dt_bias, D.sum(0))
    prepared = op._scan(*tensors, softplus=True, groups=1)
    first = op._states(None, prepared.A, len(x))
    with Largest() as largest:
        y, _, starts = launch.forward(prepared, first)
        launch.backward(prepared, starts, torch.ones_like(y), first)
    everything = proj[..., 0, 0].numel() * x.shape[3] * A.shape[2]  # states of one direction
    assert largest.elements >= x.numel()
    assert largest.elements <= everything / 2
    # Half of what the states of four directions would take: the bound above means something.
    assert buffer_bytes(**sizes, dtype=FLOAT32) + WORKSPACE < 4 * everything * 4 / 2


# Tensors of more than 2^31 elements.


def skip_without_memory(needed):
    """Skips where the device has less free memory than so many bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(
            f"needs {needed / 1e9:.0f} GB of free device memory, there are {free / 1e9:.0f}"
        )


def bytes_needed(batch, height, width, channels, n, rank, dtype):
    """For arguments, their gradients and the scan, with half as much again to spare."""
    arguments = batch * height * width * (2 * channels + 4 * (rank + 2 * n)) * dtype.itemsize
    return 1.5 * (arguments + buffer_bytes(batch, height, width, channels, n, rank, dtype))


def huge_arguments(batch, height, width, channels, n, rank, dtype):
    """Arguments of `selective_scan_2d` and a gradient of y, drawn on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape, of=FLOAT32):
        return torch.randn(shape, generator=generator, dtype=of, device=DEVICE)

    arguments = {
        "x": normal(batch, height, width, channels, of=dtype),
        "proj": normal(batch, height, width, 4, rank + 2 * n, of=dtype),
        "A": -normal(4, channels, n).abs() - 0.1,
        "dt_weight": normal(4, channels, rank) / (2 * rank**0.5),
        "dt_bias": normal(4, channels) / 4 - 2,
        "D": normal(4, channels),
    }
    return arguments, normal(batch, height, width, channels, of=dtype)


def scan_and_differentiate(arguments, grad_y):
    """y and the gradients of x and proj."""
    x, proj = (arguments[name].detach().requires_grad_() for name in ("x", "proj"))
    y = selective_scan_2d(**{**arguments, "x": x, "proj": proj}, backend="triton")
    grad_x, grad_proj = torch.autograd.grad(y, (x, proj), grad_y)
    return {"y": y.detach(), "grad of x": grad_x, "grad of proj": grad_proj}


ROWS = 32  # of a map, compared at a time


def rows_of(x):
    """A map `[B, H, W, ...]` in pieces of at most ROWS rows."""
    return x.flatten(0, 1).split(ROWS)


def last_image_is_that_of_the_image_alone(sizes):
    """Addresses of an image far into the batch; oracle is the same image alone, in fp32."""
    dtype = sizes["dtype"]
    arguments, grad_y = huge_arguments(**sizes)
    results = scan_and_differentiate(arguments, grad_y)
    tested = {name: x[-1:].clone() for name, x in results.items()}
    del results
    alone = {name: x[-1:] if name in ("x", "proj") else x for name, x in arguments.items()}
    grad_y = grad_y[-1:]
    rounded = scan_and_differentiate(alone, grad_y)
    wide = {name: x.float() for name, x in alone.items()}
    oracle = scan_and_differentiate(wide, grad_y.float())
    rule = AccuracyRule()
    for name, x in tested.items():
        assert x.dtype == dtype
        for piece in zip(rows_of(x), rows_of(rounded[name]), rows_of(oracle[name]), strict=True):
            rule.compare(name, *piece)
    checked(rule)


def forgetful(x, proj, dt_weight, dt_bias, D):
    """The scan in closed form where every state is forgotten at once: exp(dt A) = 0."""
    rank = dt_weight.shape[2]
    r, B, C = proj.split((rank, (proj.shape[-1] - rank) // 2, (proj.shape[-1] - rank) // 2), -1)
    dt = F.softplus(torch.einsum("...kr,kdr->...kd", r, dt_weight) + dt_bias)
    return ((dt * (B * C).sum(-1, keepdim=True)).sum(-2) + D.sum(0)) * x


def forgetful_rows(arguments, grad_y, x, proj, dtype):
    """y and the gradients of x and proj for some rows, computed in `dtype`."""
    io_dtype = x.dtype
    x, proj = (t.to(dtype).requires_grad_() for t in (x, proj))
    parameters = (arguments[name].to(dtype) for name in ("dt_weight", "dt_bias", "D"))
    y = forgetful(x, proj, *parameters)
    grads = torch.autograd.grad(y, (x, proj), grad_y.to(dtype))
    if dtype != FLOAT64:
        y, *grads = (t.to(io_dtype) for t in (y, *grads))
    return {
        "y": y.detach(),
        **dict(zip(("grad of x", "grad of proj"), grads, strict=True)),
    }


def every_position_has_its_closed_form(sizes):
    """Addresses of every position, in forward and backward.

    With A = -10^6 a state lasts one step, so each position has a value of its own.
    """
    arguments, grad_y = huge_arguments(**sizes)
    arguments["A"].fill_(-1e6)
    tested = scan_and_differentiate(arguments, grad_y)
    tested = {name: rows_of(x) for name, x in tested.items()}
    given_ = (rows_of(x) for x in (grad_y, arguments["x"], arguments["proj"]))
    rule = AccuracyRule()
    for k, rows in enumerate(zip(*given_, strict=True)):
        oracle = forgetful_rows(arguments, *rows, dtype=FLOAT64)
        rounded = forgetful_rows(arguments, *rows, dtype=FLOAT32)
        for name, expected in oracle.items():
            rule.compare(name, tested[name][k], rounded[name], expected)
    checked(rule)


HUGE = dict(n=1, rank=1, dtype=BFLOAT16)
X_OF_TWO_IMAGES = dict(HUGE, batch=2, height=2048, width=2048, channels=272)
X_OF_ONE_IMAGE = dict(HUGE, batch=1, height=2048, width=4096, channels=272)
PROJECTIONS = dict(HUGE, batch=1, height=3500, width=3500, channels=16, n=16, rank=12)


def test_the_huge_tensors_are_huge():
    for x in (X_OF_TWO_IMAGES, X_OF_ONE_IMAGE):
        assert x["batch"] * x["height"] * x["width"] * x["channels"] > 2**31
    p = PROJECTIONS
    assert p["height"] * p["width"] * 4 * (p["rank"] + 2 * p["n"]) > 2**31


def test_last_image_of_a_huge_batch():
    skip_without_memory(bytes_needed(**X_OF_TWO_IMAGES))
    last_image_is_that_of_the_image_alone(X_OF_TWO_IMAGES)


@pytest.mark.parametrize(
    "sizes",
    [X_OF_TWO_IMAGES, X_OF_ONE_IMAGE, PROJECTIONS],
    ids=["x-of-two-images", "x-of-one-image", "projections"],
)
def test_every_position_of_huge_tensors(sizes):
    skip_without_memory(bytes_needed(**sizes))
    every_position_has_its_closed_form(sizes)


# Arguments as they come.


def detached(arguments):
    return {name: x.detach() for name, x in tensors_of(arguments).items()}


def with_tensors(arguments, change):
    """The same arguments with every tensor changed by `change`, as leaves."""
    changed = {name: change(x).requires_grad_() for name, x in detached(arguments).items()}
    return {**arguments, **changed}


def in_reverse_order(x):
    """The same values, with the axes in memory the other way round."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def inside_a_larger_one(x):
    """The same values as every second slice of a tensor of NaN."""
    memory = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan)
    view = memory[..., 1::2]
    view.copy_(x)
    return view


def one_element_later(x):
    """The same values, contiguous, starting at element 1 of their memory."""
    memory = x.new_full((x.numel() + 1,), math.nan)
    view = memory[1:].view(x.shape)
    view.copy_(x)
    assert view.data_ptr() % 16
    return view


@MAKERS
@pytest.mark.parametrize("change", [in_reverse_order, inside_a_larger_one, one_element_later, None])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_results_do_not_depend_on_where_arguments_lie(make, change, dtype):
    arguments = make(dtype=dtype)
    expected = evaluate(arguments, "triton")
    moved = with_tensors(arguments, change) if change else guarded(arguments)
    assert_same_bits(evaluate(moved, "triton"), expected)


def expanded(x):
    """Its first value everywhere, with stride 0, as the gradient from y.sum()."""
    return x.flatten()[0].expand_as(x)


@MAKERS
@pytest.mark.parametrize(
    "change", [in_reverse_order, inside_a_larger_one, one_element_later, expanded]
)
def test_results_do_not_depend_on_where_gradients_lie(make, change):
    arguments = make()
    inputs = list(tensors_of(arguments).values())
    y = scan_of(arguments)(**arguments, backend="triton")
    grad_y = change(torch.randn_like(y).contiguous())
    expected = torch.autograd.grad(y, inputs, grad_y.contiguous(), retain_graph=True)
    assert_equal(torch.autograd.grad(y, inputs, grad_y), expected)


@pytest.mark.parametrize("wanted", [["u"], ["A", "C"], ["initial_state", "D"]], ids=str)
def test_gradients_of_some_arguments_are_those_of_all(wanted):
    arguments = small_sequence()
    inputs = tensors_of(arguments)
    y, last = selective_scan(**arguments, return_last_state=True, backend="triton")
    outputs = [y.sum() + last.square().sum()]
    expected = dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values())), strict=True))
    some = {name: x if name in wanted else x.detach() for name, x in inputs.items()}
    y, last = selective_scan(**{**arguments, **some}, return_last_state=True, backend="triton")
    grads = torch.autograd.grad([y.sum() + last.square().sum()], [some[name] for name in wanted])
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


def test_gradient_flows_through_the_last_state_alone():
    arguments = small_sequence(gate=False, skip=False)
    names = ("u", "delta", "A", "B", "initial_state")

    def gradients(arguments, backend):
        _, last = selective_scan(**arguments, return_last_state=True, backend=backend)
        return torch.autograd.grad(last.square().sum(), [arguments[name] for name in names])

    oracle = gradients(to_double(arguments), "reference")
    rounded, tested = (gradients(arguments, backend) for backend in ("reference", "triton"))
    rule = AccuracyRule()
    for name, *grads in zip(names, tested, rounded, oracle, strict=True):
        rule.compare(name, *grads)
    checked(rule)


@contextlib.contextmanager
def guarded_memory():
    """Memory that a launch allocates is NaN until it is written, and lies between NaN.

    Yields the list of those stretches of memory, margins included.
    """
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    allocated = []

    def guard(plain):
        size = plain.numel() + 2 * GUARD
        memory = new_empty(plain, (size,), dtype=plain.dtype).fill_(math.nan)
        allocated.append(memory)
        return memory[GUARD:-GUARD].view(plain.shape)

    with (
        mock.patch.object(
            torch.Tensor, "new_empty", lambda *args, **kw: guard(new_empty(*args, **kw))
        ),
        mock.patch.object(torch, "empty_like", lambda *args, **kw: guard(empty_like(*args, **kw))),
    ):
        yield allocated


@ALL_MAPS
def test_maps_keep_to_their_memory(name, dtype):
    assert_kept_to_memory(small_map(name, dtype))


@ALL_SEQUENCES
def test_sequences_keep_to_their_memory(name, dtype):
    assert_kept_to_memory(small_sequence(name, dtype))


def assert_kept_to_memory(arguments):
    with guarded_memory() as allocated:
        results = evaluate(arguments, "triton")
    assert len(allocated) > 8
    for memory in allocated:
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()
    assert_same_bits(results, evaluate(arguments, "triton"))


@MAKERS
def test_autocast_changes_nothing(make):
    arguments = make()
    expected = evaluate(arguments, "triton")
    with torch.autocast(DEVICE, dtype=BFLOAT16):
        results = evaluate(arguments, "triton")
    assert_same_bits(results, expected)


# Repeatability.

# Among them one whose blocks are half a warp, in either precision.
REPEATED = [("N16-R12", FLOAT32), ("N16-R12", BFLOAT16), ("N16-R12", FLOAT64), ("N32-R64", FLOAT32)]
REPEATED_SIZES = {"height": 33, "width": 31}


def repeated_arguments():
    for name, dtype in REPEATED:
        yield small_map(name, dtype, **REPEATED_SIZES)
    for name in ("varying", "both-constant"):
        yield small_sequence(name, length=1000)


def test_ten_runs_give_the_same_bits():
    for arguments in repeated_arguments():
        expected = evaluate(arguments, "triton")
        for _ in range(9):
            assert_same_bits(evaluate(arguments, "triton"), expected)


@pytest.fixture
def _deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic_algorithms")
def test_deterministic_algorithms_give_the_same_bits():
    for arguments in repeated_arguments():
        results = evaluate(arguments, "triton")  # in memory that torch has filled with NaN
        torch.use_deterministic_algorithms(False)
        expected = evaluate(arguments, "triton")
        torch.use_deterministic_algorithms(True)
        assert_same_bits(results, expected)


# Compilers.


@contextlib.contextmanager
def inductor():
    """A fresh compiler that works in this process; its own warnings are not under test."""
    import torch._inductor.config

    torch._dynamo.reset()
    with warnings.catch_warnings(), torch._inductor.config.patch(compile_threads=1):
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@MAKERS
def test_inductor_compiles_forward_and_backward(make):
    arguments = make()
    inputs = list(tensors_of(arguments).values())
    scan_ = scan_of(arguments)

    def call(a):
        return scan_(**a, backend="triton").square()

    expected = call(arguments)
    grad_y = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad_y)
    with inductor():
        y = torch.compile(call, fullgraph=True)(arguments)
        grads = torch.autograd.grad(y, inputs, grad_y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_inductor_compiles_for_all_map_sizes_at_once():
    with inductor():
        compiled = torch.compile(selective_scan_2d, fullgraph=True, dynamic=True)
        for height, width in ((5, 3), (8, 7), (12, 4), (20, 9)):
            a = detached(small_map("N2-R4", height=height, width=width))
            with torch._dynamo.config.patch(error_on_recompile=height > 8):
                y = compiled(**a, backend="triton")
            torch.testing.assert_close(y, selective_scan_2d(**a, backend="triton"))


class Scan2d(torch.nn.Module):
    def forward(self, x, proj, A, dt_weight, dt_bias, D):
        return selective_scan_2d(x, proj, A, dt_weight, dt_bias, D, backend="triton")


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True, backend="triton")


def test_exports_with_free_map_sizes():
    inputs = tuple(detached(small_map("N2-R4")).values())
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = {1: height, 2: width}
    shapes = (sizes, sizes, None, None, None, None)
    program = torch.export.export(Scan2d(), inputs, dynamic_shapes=shapes).module()
    for others in (inputs, tuple(detached(small_map("N2-R4", height=20, width=9)).values())):
        torch.testing.assert_close(program(*others), Scan2d()(*others))


def test_exports_the_1d_scan():
    arguments = detached(small_sequence())
    inputs = tuple(arguments[name] for name in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), inputs).module()
    torch.testing.assert_close(program(*inputs), Scan()(*inputs))


def operator_calls(monkeypatch, arguments):
    """Arguments of `triton_scan` and of `triton_scan_backward` when these arguments are scanned."""
    calls = []

    def recorded(*args):
        calls.append(args)
        return op.eager_scan(*args)

    with monkeypatch.context() as patch:
        patch.setattr(backend, "eager_scan", recorded)
        evaluate(arguments, "triton")
    *tensors, _, begins, softplus, groups = forward = calls[0]
    y, last, starts = op.triton_scan(*forward)
    is_sequence = starts.shape[1] == 1
    gradients = torch.randn_like(y), torch.randn_like(last) if is_sequence else None
    return forward, (*gradients, *tensors, begins, starts, softplus, groups)


def leaves(args, requires_grad):
    return tuple(
        x.detach().requires_grad_(requires_grad and x.is_floating_point())
        if isinstance(x, torch.Tensor)
        else x
        for x in args
    )


@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize(
    "make",
    [
        lambda **sizes: small_map("N2-R4", **sizes),
        small_sequence,
        lambda **sizes: small_sequence("both-constant", **sizes),
        lambda **sizes: small_sequence("B-grouped", **sizes),
    ],
    ids=["map", "varying", "both-constant", "B-grouped"],
)
def test_opcheck(make, batch, monkeypatch):
    forward, backward = operator_calls(monkeypatch, make(batch=batch))
    torch.library.opcheck(op.triton_scan, leaves(forward, True))
    torch.library.opcheck(op.triton_scan_backward, leaves(backward, False))


# CUDA graphs and streams.


def results_of(arguments, grad_y):
    """y and all gradients, holding on to no autograd graph."""
    y = scan_of(arguments)(**arguments, backend="triton")
    grads = torch.autograd.grad(y, list(tensors_of(arguments).values()), grad_y)
    return [y.detach(), *grads]


@MAKERS
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward-and-backward"])
def test_a_cuda_graph_replays_with_new_inputs(make, gradients):
    arguments = make(seed=0)
    grad_y = torch.zeros_like(arguments["x" if "x" in arguments else "u"])

    def run(arguments):
        if gradients:
            return results_of(arguments, grad_y)
        with torch.no_grad():
            return [scan_of(arguments)(**arguments, backend="triton")]

    graph, results = captured(lambda: run(arguments))
    for seed in (1, 2):
        others = make(seed=seed)
        with torch.no_grad():
            grad_y.normal_()
            for name, x in tensors_of(arguments).items():
                x.copy_(others[name])
        graph.replay()
        assert_equal(results, run(others))


def captured(run):
    """A CUDA graph of `run`, after a warm-up on a stream of its own, and the result of `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


# The callable keeps the autograd graph of its own capture, and so of the stream of that.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_graphed_callables_are_the_scan():
    def call(x, proj, A, dt_weight, dt_bias, D):
        return selective_scan_2d(x, proj, A, dt_weight, dt_bias, D, backend="triton")

    sample = tuple(small_map("N2-R4").values())
    graphed = torch.cuda.make_graphed_callables(call, sample)
    for seed in (1, 2):
        others = small_map("N2-R4", seed=seed)
        expected = call(**others)
        grad_y = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, list(others.values()), grad_y)
        y = graphed(*others.values())
        grads = torch.autograd.grad(y, list(others.values()), grad_y)
        assert torch.equal(y, expected)
        assert_equal(grads, expected_grads)


@MAKERS
def test_runs_on_the_current_stream(make):
    source = make()
    expected = evaluate(source, "triton")
    late = {name: torch.zeros_like(x) for name, x in detached(source).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        for name, x in late.items():
            x.copy_(source[name].detach())
        # A launch on any other stream would still see zeros.
        results = evaluate({**source, **require_gradients(late)}, "triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(results, expected)


@MAKERS
def test_runs_on_the_device_of_its_arguments(make):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    here = evaluate(on_device(make(), "cuda:0"), "triton")
    assert torch.cuda.current_device() == 0
    there = evaluate(on_device(make(), "cuda:1"), "triton")
    assert torch.cuda.current_device() == 0
    for name, x in there.items():
        assert x.device == torch.device("cuda:1"), name
        assert torch.equal(x.cpu(), here[name].cpu()), name


# The choice of a backend.


@pytest.fixture
def chosen(monkeypatch):
    """The list of backends that calls go to, with no default set."""
    monkeypatch.delenv("CMAMBA_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_default_backend", None)
    monkeypatch.setattr(dispatch, "_logged_reasons", set())
    return record_backends(monkeypatch)


def test_auto_takes_triton(chosen):
    assert ops.available_backends() == tuple(dispatch.BACKENDS)
    assert dispatch.choose("auto", DEVICE, tiling.MAX_STATES, tiling.MAX_RANK) == "triton"
    selective_scan_2d(**small_map("N2-R4"))
    selective_scan(**small_sequence())
    assert chosen == ["triton", "triton"]


@pytest.mark.parametrize(
    "make, sizes, reason",
    [
        (small_map, {"n": tiling.MAX_STATES + 1}, f"N <= {tiling.MAX_STATES}"),
        (small_map, {"rank": tiling.MAX_RANK + 1}, f"R <= {tiling.MAX_RANK}"),
        (small_sequence, {"n": tiling.MAX_STATES + 1}, f"N <= {tiling.MAX_STATES}"),
    ],
)
def test_auto_takes_chunked_where_the_kernels_cannot(make, sizes, reason, chosen, caplog):
    arguments = make(**sizes)
    caplog.set_level(logging.INFO, logger="cmamba_ref.ops")
    for _ in range(2):
        y = scan_of(arguments)(**arguments)
    expected = scan_of(arguments)(**arguments, backend="reference")
    assert worst(y - expected) <= 1e-5 * worst(expected)
    assert chosen == ["chunked", "chunked", "reference"]
    messages = [r.getMessage() for r in caplog.records if r.name == "cmamba_ref.ops"]
    assert len(messages) == 1 and reason in messages[0]
    with pytest.raises(BackendUnavailableError, match=reason):
        scan_of(arguments)(**arguments, backend="triton")


# Training.

STEPS = 20
SEEDS = (0, 1, 2)


def learning_curve(backend, seed, steps=STEPS):
    """Losses of the first steps of training on from the bundled weights of `tiny`.

    From fresh weights they would say less: a fresh global path is the identity, so the first loss
    does not depend on any scan, and at first a training amplifies rounding by far more.
    """
    with Image.open(IMAGE) as image:
        pixels = np.asarray(image.convert("RGB"))
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = CMamba.from_pretrained("tiny", device=DEVICE).train().requires_grad_(True)
    assert model.gain is not None
    named = dict(model.named_parameters())
    del named["entropy_bottleneck.quantiles"]  # has a loss of its own
    parameters = list(named.values())
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    quality = torch.tensor([2.5, 6.5], device=DEVICE)
    losses = []
    with ops.scan_backend(backend):
        for _ in range(steps):
            crops = []
            for _ in quality:
                top, left = (int(rng.integers(size - 63)) for size in pixels.shape[:2])
                crops.append(pixels[top : top + 64, left : left + 64])
            x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).to(DEVICE).float() / 255
            terms = rate_distortion_loss(model(x, quality), x, model.gain.lmbda(quality))
            loss = terms["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    return np.array(losses)


def test_tiny_learns_the_same_with_every_backend():
    """20 steps in fp32 with each backend: same weights, images and noise.

    A training amplifies rounding, and a symbol that rounds the other way makes the loss jump. So a
    curve's deviation from that of the reference is its largest relative one over the steps, of
    which the median over the seeds counts; for triton it is at most twice that for chunked and 32
    eps. On a CPU, chunked is off by 1e-6, as is a chunked scan with noise of 1e-7 or 1e-6 on every
    argument, output and gradient (3e-6 at most); a gradient of x wrong by 0.1 % or of the
    projections by 1 % gives 1e-3.
    """
    deviations = {"chunked": [], "triton": []}
    # TF32 and algorithms that sum in any order would drown what is compared.
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    assert not torch.backends.cuda.matmul.allow_tf32
    with exact:
        for seed in SEEDS:
            expected = learning_curve("reference", seed)
            assert np.isfinite(expected).all()
            for backend, found in deviations.items():
                curve = learning_curve(backend, seed)
                found.append(float(np.abs(curve / expected - 1).max()))
    print(deviations)
    bound = 2 * np.median(deviations["chunked"]) + 32 * torch.finfo(FLOAT32).eps
    assert np.median(deviations["triton"]) <= bound
