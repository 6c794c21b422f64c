"""The blocks that TorchInductor compiles; small ones, so that this takes seconds."""

import pytest
import torch
from torch._dynamo.utils import counters

from cmamba_ref import ops
from cmamba_ref.ops import blocks, compiled, selective_scan_2d
from cmamba_ref.testing import assert_accurate, evaluate, scan_2d_arguments, scan_arguments

pytestmark = pytest.mark.skipif(
    compiled.unavailable_reason("cpu") is not None, reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Blocks of two chunks, with up to eight pairs of a step and a state written out."""
    monkeypatch.setattr(compiled, "UNROLLED", 8)
    monkeypatch.setattr(compiled, "UNROLLED_STATES", 4)
    monkeypatch.setattr(compiled, "MAX_CHUNKS", 2)
    monkeypatch.setattr(compiled, "MIN_CHUNKS", 2)
    compiled._compiled.cache_clear()


@pytest.fixture
def made(monkeypatch):
    """What was compiled, and what was left over for eager blocks."""
    calls = []
    compile_, forward = compiled._compiled, compiled.Blocks.forward

    def recorded(*args):
        calls.append("compiled")
        return compile_(*args)

    def left_over(*args):
        calls.append("left over")
        return forward(*args)

    monkeypatch.setattr(compiled, "_compiled", recorded)
    monkeypatch.setattr(compiled.Blocks, "forward", left_over)
    return calls


@pytest.fixture
def map_arguments():
    """A map with three blocks and a rest; six states are two parts of three."""
    sizes = {"batch": 2, "height": 3, "width": 5, "channels": 20, "n": 6}
    return scan_2d_arguments(**sizes, dtype=torch.float32)


def test_map_with_a_rest_is_as_accurate_as_reference(map_arguments, made):
    assert_accurate("compiled", map_arguments)
    assert made == ["compiled", "left over"]

    without_gradient = {name: x.detach() for name, x in map_arguments.items()}
    with torch.no_grad():
        y = selective_scan_2d(**without_gradient, backend="compiled")
    assert torch.equal(y, evaluate(map_arguments, "compiled")["y"])


def test_sequence_with_a_constant_and_a_grouped_projection_is_as_accurate_as_reference(made):
    arguments = scan_arguments(
        channels=8, length=9, n=3, b_form="constant", c_form="grouped", groups=2
    )
    assert_accurate("compiled", arguments)
    assert made == ["compiled", "left over"]


def test_constant_projections_of_single_channels_and_a_long_rest(made, monkeypatch):
    """As many groups as channels; and more left over than a block of eager steps would hold."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_LENGTH", 2)
    monkeypatch.setattr(blocks, "MIN_BLOCK_LENGTH", 2)
    arguments = scan_arguments(
        channels=3, length=15, n=2, b_form="constant", c_form="grouped", groups=3
    )
    assert_accurate("compiled", arguments)
    assert made == ["compiled", *["left over"] * 4]


def test_no_batch_is_nothing_to_compile(made):
    evaluate(scan_2d_arguments(batch=0, height=3, width=5, dtype=torch.float32), "compiled")
    assert set(made) == {"left over"}


def test_what_was_compiled_serves_the_next_scan_of_the_same_form(map_arguments):
    first = evaluate(map_arguments, "compiled")
    assert compiled._compiled.cache_info().misses == 1
    second = evaluate(map_arguments, "compiled")
    assert compiled._compiled.cache_info().misses == 1

    compiled._compiled.cache_clear()  # as in a new process: what is on disk serves it
    counters["inductor"].clear()
    third = evaluate(map_arguments, "compiled")
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    for name, x in first.items():
        assert torch.equal(second[name], x), name
        assert torch.equal(third[name], x), name


def test_a_model_around_it_compiles_without_a_graph_break():
    """With a map of three positions: nothing for TorchInductor, only what is left over."""
    arguments = scan_2d_arguments(height=1, width=3, dtype=torch.float32)

    def call(x):
        return selective_scan_2d(**{**arguments, "x": x}, backend="compiled")

    inside = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(inside(arguments["x"]), call(arguments["x"]))


def test_compiled_is_available_and_never_chosen_unasked():
    assert "compiled" in ops.available_backends()
    assert ops.dispatch.choose("auto", "cpu") == "chunked"


def test_exp2_is_right_to_the_last_place_and_at_the_ends():
    x = torch.linspace(-126.4, 127.4, 1_000_001)
    expected = torch.exp2(x.double())
    error = (compiled.exp2(x).double() - expected) / expected
    assert error.abs().max() < 1.2 * torch.finfo(torch.float32).eps
    whole = torch.arange(-126.0, 127)
    assert torch.equal(compiled.exp2(whole), torch.exp2(whole))

    inf, nan = float("inf"), float("nan")
    ends = compiled.exp2(torch.tensor([-1e30, -200.0, 0.0, -0.0, 128.0, 1e30, nan]))
    expected_ends = torch.tensor([0.0, 0.0, 1.0, 1.0, inf, inf, nan])
    torch.testing.assert_close(ends, expected_ends, rtol=0, atol=0, equal_nan=True)
