"""The blocks that TorchInductor compiles; with few steps, so that this takes seconds."""

import pytest
import torch
from scan_helpers import (
    assert_as_accurate_as_reference,
    evaluate,
    scan_2d_arguments,
    scan_arguments,
)

from cmamba_ref import ops
from cmamba_ref.ops import blocks, compiled, selective_scan_2d

pytestmark = pytest.mark.skipif(
    compiled.unavailable_reason("cpu") is not None, reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Blocks of four steps, worked on in stretches of two states."""
    monkeypatch.setattr(compiled, "MAX_STEPS", 4)
    monkeypatch.setattr(compiled, "MIN_STEPS", 4)
    monkeypatch.setattr(compiled, "STRETCH_FLOATS", 2 * 2 * 4 * 5 * 20)
    compiled._program.cache_clear()


@pytest.fixture
def made(monkeypatch):
    """The names of what was compiled, and of what was left over for eager blocks."""
    calls = []
    program, forward = compiled._program, compiled.Blocks.forward

    def recorded(steps, *rest):
        calls.append(steps.__name__)
        return program(steps, *rest)

    def left_over(*args):
        calls.append("left over")
        return forward(*args)

    monkeypatch.setattr(compiled, "_program", recorded)
    monkeypatch.setattr(compiled.Blocks, "forward", left_over)
    return calls


def test_map_with_a_rest_is_as_accurate_as_reference(made):
    sizes = {"batch": 2, "height": 3, "width": 5, "channels": 20, "n": 5}
    arguments = scan_2d_arguments(**sizes, dtype=torch.float32)
    assert_as_accurate_as_reference(arguments, "compiled")
    assert made == ["forward_steps", "left over", "backward_steps"]

    without_gradient = {name: x.detach() for name, x in arguments.items()}
    with torch.no_grad():
        y = selective_scan_2d(**without_gradient, backend="compiled")
    assert torch.equal(y, evaluate(arguments, "compiled")["y"])


def test_sequence_with_a_constant_and_a_grouped_projection_is_as_accurate_as_reference(made):
    arguments = scan_arguments(
        channels=8, length=9, n=3, b_form="constant", c_form="grouped", groups=2
    )
    assert_as_accurate_as_reference(arguments, "compiled")
    assert made == ["forward_steps", "left over", "backward_steps"]


def test_constant_projections_of_single_channels_and_a_long_rest(made, monkeypatch):
    """As many groups as channels; and more left over than a block of eager steps would hold."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_LENGTH", 2)
    monkeypatch.setattr(blocks, "MIN_BLOCK_LENGTH", 2)
    arguments = scan_arguments(
        channels=3, length=7, n=2, b_form="constant", c_form="grouped", groups=3
    )
    assert_as_accurate_as_reference(arguments, "compiled")
    assert made == ["forward_steps", "left over", "backward_steps"]


def test_no_batch_is_nothing_to_compile(made):
    evaluate(scan_2d_arguments(batch=0, height=3, width=5, dtype=torch.float32), "compiled")
    assert set(made) == {"left over"}


def test_what_was_compiled_serves_the_next_scan_of_the_same_form():
    arguments = scan_2d_arguments(dtype=torch.float32)
    first = evaluate(arguments, "compiled")
    count = compiled._program.cache_info().misses
    second = evaluate(arguments, "compiled")
    assert compiled._program.cache_info().misses == count == 2
    for name, x in first.items():
        assert torch.equal(second[name], x), name


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
