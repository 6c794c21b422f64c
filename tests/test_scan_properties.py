"""The scans on drawn shapes, and the laws that a linear recurrence obeys."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scan_helpers import EAGER_BACKENDS

from cmamba_ref.ops import selective_scan, selective_scan_2d
from cmamba_ref.testing import assert_accurate, scan_2d_arguments, scan_arguments

states = st.sampled_from((1, 2, 4, 8, 16))
seeds = st.integers(0, 2**16)
batches = st.sampled_from((1, 1, 2, 3, 0))
single_or_double = st.sampled_from((torch.float32, torch.float32, torch.float64))


@st.composite
def scans(draw, packed=False):
    """Arguments of `selective_scan`: every form of every argument."""
    groups = draw(st.sampled_from((1, 2, 3)))
    forms = st.sampled_from(("constant", "varying", "grouped"))
    return scan_arguments(
        draw(seeds),
        batch=draw(batches),
        channels=groups * draw(st.integers(1, 4)),
        length=draw(st.integers(1, 24) | st.sampled_from((64, 144))),
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


@st.composite
def scans_2d(draw):
    """Arguments of `selective_scan_2d`: odd maps, single rows and single columns."""
    side = st.integers(1, 7)
    height, width = draw(
        st.tuples(side, side)
        | st.tuples(st.just(1), st.integers(1, 40))
        | st.tuples(st.integers(1, 40), st.just(1))
    )
    return scan_2d_arguments(
        draw(seeds),
        batch=draw(batches),
        height=height,
        width=width,
        channels=draw(st.sampled_from((1, 3, 8))),
        n=draw(states),
        rank=draw(st.integers(1, 20)),
        skip=draw(st.booleans()),
        dtype=draw(single_or_double),
    )


@given(scans())
def test_chunked_scan_is_as_accurate_as_the_reference(arguments):
    assert_accurate("chunked", arguments)


@given(scans(packed=True))
def test_chunked_scan_of_packed_sequences_is_as_accurate_as_the_reference(arguments):
    # A short sequence sums few terms, and now and then the reference rounds hardly at all.
    assert_accurate("chunked", arguments, allowance=2)


@given(scans_2d())
def test_chunked_scan_2d_is_as_accurate_as_the_reference(arguments):
    assert_accurate("chunked", arguments)


def positions(arguments: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments restricted to some positions of the sequence."""
    varying = {"u", "delta", "z"} | {k for k in "BC" if arguments[k].dim() > 2}
    return {
        name: x[..., start:stop] if name in varying and x is not None else x
        for name, x in arguments.items()
    }


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
@given(a=scans(), cut=st.floats(0, 1))
def test_segments_with_carried_state_equal_one_scan(backend, a, cut):
    length = a["u"].shape[-1]
    middle = min(max(round(cut * length), 1), length - 1) or length
    whole, last = selective_scan(**a, return_last_state=True, backend=backend)
    first, state = selective_scan(
        **positions(a, 0, middle), return_last_state=True, backend=backend
    )
    pieces = [first]
    if middle < length:
        rest = {**positions(a, middle, length), "initial_state": state}
        second, state = selective_scan(**rest, return_last_state=True, backend=backend)
        pieces.append(second)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
@given(seed=seeds, scale=st.floats(-3, 3))
def test_linear_in_u(backend, seed, scale):
    a = scan_arguments(seed, initial_state=False)
    other = scan_arguments(seed + 1, initial_state=False)["u"]

    def scan(u):
        return selective_scan(**{**a, "u": u}, backend=backend)

    combined = scan(a["u"] + scale * other)
    torch.testing.assert_close(combined, scan(a["u"]) + scale * scan(other))


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
@given(seed=seeds)
def test_images_and_channels_are_independent(backend, seed):
    a = scan_2d_arguments(seed, batch=3, channels=5)
    whole = selective_scan_2d(**a, backend=backend)
    one_image = {**a, "x": a["x"][1:2], "proj": a["proj"][1:2]}
    torch.testing.assert_close(selective_scan_2d(**one_image, backend=backend), whole[1:2])

    some = torch.tensor([3, 0])
    some_channels = {
        "x": a["x"][..., some],
        "proj": a["proj"],
        **{name: a[name][:, some] for name in ("A", "dt_weight", "dt_bias", "D")},
    }
    result = selective_scan_2d(**some_channels, backend=backend)
    torch.testing.assert_close(result, whole[..., some])


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
@given(seed=seeds)
def test_rotating_the_map_permutes_the_directions(backend, seed):
    """Transposing exchanges rows and columns; turning by 180 degrees reverses both."""
    a = scan_2d_arguments(seed, height=4, width=5)
    y = selective_scan_2d(**a, backend=backend)

    def exchanged(order, turn):
        parameters = {name: a[name][order] for name in ("A", "dt_weight", "dt_bias", "D")}
        return selective_scan_2d(
            turn(a["x"]), turn(a["proj"])[:, :, :, order], **parameters, backend=backend
        )

    transposed = exchanged([1, 0, 3, 2], lambda m: m.transpose(1, 2))
    torch.testing.assert_close(transposed.transpose(1, 2), y)
    reversed_map = exchanged([2, 3, 0, 1], lambda m: m.flip(1, 2))
    torch.testing.assert_close(reversed_map.flip(1, 2), y)


@pytest.mark.parametrize("backend", EAGER_BACKENDS)
def test_scan_is_causal(backend):
    a = scan_arguments()
    y = selective_scan(**a, backend=backend)
    (grad,) = torch.autograd.grad(y[..., 8].sum(), a["u"])
    assert (grad[..., 9:] == 0).all() and (grad[..., :9] != 0).any()
