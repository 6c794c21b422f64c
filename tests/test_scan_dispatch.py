"""The choice of a backend, and the errors of the scans."""

import logging
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from scan_helpers import record_backends

import cmamba_ref.ops as ops
from cmamba_ref.errors import BackendUnavailableError, InvalidArgumentError
from cmamba_ref.ops import Backend, dispatch, selective_scan, selective_scan_2d
from cmamba_ref.testing import assert_accurate, scan_2d_arguments, scan_arguments


@pytest.fixture
def registry():
    """The registered backends, put back as they were after the test."""
    with mock.patch.dict(dispatch.BACKENDS):
        yield dispatch.BACKENDS


# `registry` first, so that what `monkeypatch` put into it is taken back before.
@pytest.fixture(autouse=True)
def _no_default(registry, monkeypatch):
    monkeypatch.delenv("CMAMBA_SCAN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_default_backend", None)
    monkeypatch.setattr(dispatch, "_logged_reasons", set())


@pytest.fixture
def _no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", None)


@pytest.fixture
def chosen(monkeypatch):
    """The list of backends that calls went to."""
    return record_backends(monkeypatch)


def test_precedence_of_backend_choices(monkeypatch, chosen):
    a = scan_arguments()
    selective_scan(**a)
    monkeypatch.setenv("CMAMBA_SCAN_BACKEND", "reference")
    selective_scan(**a)
    with ops.scan_backend("chunked"):
        selective_scan(**a)
        with ops.scan_backend("reference"):
            selective_scan(**a)
            selective_scan(**a, backend="chunked")
        assert ops.get_default_backend() == "chunked"
    assert ops.get_default_backend() == "reference"
    assert chosen == ["chunked", "reference", "chunked", "reference", "chunked"]


def test_context_restores_the_default(chosen):
    ops.set_default_backend("reference")
    selective_scan_2d(**scan_2d_arguments())
    ops.set_default_backend(None)
    selective_scan_2d(**scan_2d_arguments())
    assert chosen == ["reference", "chunked"]
    assert ops.get_default_backend() == "auto"


def test_context_is_left_on_an_exception():
    with pytest.raises(KeyError), ops.scan_backend("reference"):
        raise KeyError
    assert ops.get_default_backend() == "auto"


def test_context_restores_after_nested_changes():
    """It restores what was set before it, also where that is nothing and the environment counts."""
    with ops.scan_backend("reference"):
        ops.set_default_backend("chunked")
        assert ops.get_default_backend() == "chunked"
    assert ops.get_default_backend() == "auto"
    ops.set_default_backend("reference")
    with ops.scan_backend("auto"):
        assert ops.get_default_backend() == "auto"
    assert ops.get_default_backend() == "reference"


def test_unknown_names_list_the_valid_ones(monkeypatch):
    valid = "'auto', 'reference', 'chunked', 'triton'"
    with pytest.raises(InvalidArgumentError, match=f"`backend` must be one of {valid}, got 'fast'"):
        selective_scan(**scan_arguments(), backend="fast")
    with pytest.raises(InvalidArgumentError, match=f"{valid}, got 'compiled'"):
        selective_scan_2d(**scan_2d_arguments(), backend="compiled")  # there once was one
    with pytest.raises(InvalidArgumentError, match=valid):
        ops.set_default_backend("cuda")
    with pytest.raises(InvalidArgumentError, match=valid), ops.scan_backend(""):
        pass
    monkeypatch.setenv("CMAMBA_SCAN_BACKEND", "Chunked")
    with pytest.raises(InvalidArgumentError, match="`CMAMBA_SCAN_BACKEND` must be one of"):
        selective_scan(**scan_arguments())


@pytest.mark.usefixtures("_no_kernels")
def test_triton_by_name_never_falls_back(monkeypatch):
    with pytest.raises(BackendUnavailableError, match="lacks its kernels.*backend='auto'"):
        selective_scan(**scan_arguments(), backend="triton")
    with pytest.raises(BackendUnavailableError), ops.scan_backend("triton"):
        selective_scan_2d(**scan_2d_arguments())
    monkeypatch.setenv("CMAMBA_SCAN_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError):
        selective_scan_2d(**scan_2d_arguments())
    assert ops.available_backends() == ("reference", "chunked")


@pytest.mark.parametrize("module", ["cmamba_ref.kernels", "triton"])
def test_auto_on_cuda_warns_once_where_the_kernels_are_not_installed(module, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, module, None)
    assert [dispatch.choose("auto", "cuda") for _ in range(3)] == ["chunked"] * 3
    assert dispatch.choose("auto", "cpu") == "chunked"
    (record,) = (r for r in caplog.records if r.name == "cmamba_ref.ops")
    assert record.levelno == logging.WARNING
    assert "'chunked'" in record.getMessage() and "install" in record.getMessage()


def test_auto_on_cuda_only_mentions_what_the_kernels_cannot_do(monkeypatch, caplog):
    kernels = SimpleNamespace(
        unavailable_reason=lambda device_type: None,
        size_reason=lambda n, rank: f"N = {n} is large" if n > 32 else None,
    )
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", kernels)
    caplog.set_level(logging.INFO, logger="cmamba_ref.ops")
    assert [dispatch.choose("auto", "cuda", 64) for _ in range(3)] == ["chunked"] * 3
    (record,) = (r for r in caplog.records if r.name == "cmamba_ref.ops")
    assert record.levelno == logging.INFO and "N = 64 is large" in record.getMessage()


def test_auto_on_cuda_warns_where_triton_cannot_start(monkeypatch, caplog):
    kernels = SimpleNamespace(unavailable_reason=lambda device_type: "no C compiler")
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", kernels)
    assert dispatch.choose("auto", "cuda") == "chunked"
    (record,) = (r for r in caplog.records if r.name == "cmamba_ref.ops")
    assert record.levelno == logging.WARNING and "no C compiler" in record.getMessage()


def small_backend(**changes):
    """A backend of one's own: the reference, for at most three states."""
    reference = dispatch.BACKENDS["reference"]

    def refusal(device_type, n, rank):
        return f"it holds N <= 3 states, got {n}" if n > 3 else None

    fields = {
        "name": "mine",
        "scan": lambda inputs: reference.scan(inputs),
        "scan_2d": lambda inputs: reference.scan_2d(inputs),
        "refusal": refusal,
    }
    return Backend(**fields | changes)


def test_custom_backend_is_used_by_name(registry, monkeypatch):
    ops.register_backend(small_backend())
    chosen = record_backends(monkeypatch)
    a, b = scan_arguments(n=3), scan_2d_arguments(n=3)
    assert_accurate("mine", a)
    assert_accurate("mine", b)
    assert chosen.count("mine") == 2
    chosen.clear()

    selective_scan(**a, backend="mine")
    with ops.scan_backend("mine"):
        selective_scan_2d(**b)
    ops.set_default_backend("mine")
    selective_scan(**a)
    ops.set_default_backend(None)
    monkeypatch.setenv("CMAMBA_SCAN_BACKEND", "mine")
    selective_scan_2d(**b)
    assert chosen == ["mine"] * 4
    monkeypatch.delenv("CMAMBA_SCAN_BACKEND")
    selective_scan(**a)
    assert chosen.pop() == "chunked"  # `auto` does not choose it

    assert ops.available_backends()[-1] == "mine"
    with pytest.raises(InvalidArgumentError, match="'triton', 'mine', got 'my'; correct the name"):
        selective_scan(**a, backend="my")
    with pytest.raises(BackendUnavailableError, match="got 'mine': it holds N <= 3 states, got 4"):
        selective_scan(**scan_arguments(n=4), backend="mine")


def test_model_with_a_custom_backend_compiles(registry):
    ops.register_backend(small_backend())
    arguments = scan_2d_arguments(height=1, width=3, dtype=torch.float32)

    def call(x):
        return selective_scan_2d(**{**arguments, "x": x}, backend="mine")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(arguments["x"]), call(arguments["x"]))


def test_a_backend_that_cannot_run_here_is_registered_and_not_available(registry):
    ops.register_backend(small_backend(refusal=lambda device_type, n, rank: "it needs a TPU"))
    assert "mine" not in ops.available_backends()
    with pytest.raises(BackendUnavailableError, match="'mine': it needs a TPU; use backend='auto'"):
        selective_scan(**scan_arguments(), backend="mine")


@pytest.mark.parametrize("name", ["reference", "chunked", "triton"])
def test_a_name_is_registered_once(name, registry):
    before = registry[name]
    with pytest.raises(InvalidArgumentError, match=f"a name of its own, got '{name}'"):
        ops.register_backend(small_backend(name=name))
    assert registry[name] is before


def test_wrong_backends_are_refused(registry):
    before = dict(registry)
    with pytest.raises(InvalidArgumentError, match="`backend` must be a Backend, got function"):
        ops.register_backend(small_backend)
    for name in ("", " ", "auto", None):
        with pytest.raises(InvalidArgumentError, match="`name` must be a word other than 'auto'"):
            small_backend(name=name)
    for field in ("scan", "scan_2d", "refusal"):
        with pytest.raises(InvalidArgumentError, match=f"`{field}` must be a function, got None"):
            small_backend(**{field: None})
    assert registry == before


def test_auto_takes_triton_where_the_kernels_run(monkeypatch):
    reasons = {"cuda": None, "cpu": "Triton needs a GPU"}
    kernels = SimpleNamespace(unavailable_reason=reasons.get, size_reason=lambda n, rank: None)
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", kernels)
    assert dispatch.choose("auto", "cuda") == "triton"
    assert dispatch.choose("auto", "cpu") == "chunked"
    assert dispatch.choose("chunked", "cuda") == "chunked"
    with pytest.raises(BackendUnavailableError, match="Triton needs a GPU"):
        dispatch.choose("triton", "cpu")


def wrong(name, change, message):
    return pytest.param(name, change, message, id=f"{name}-{message}")


@pytest.mark.parametrize(
    "name, change, message",
    [
        wrong("u", lambda x: x[0], r"`u` must be \[B, D, L\], 3 axes"),
        wrong("u", lambda x: x[..., :0], "without empty axes"),
        wrong("u", lambda x: x.long(), "fp16, bf16, fp32 or fp64"),
        wrong("u", lambda x: x.tolist(), "`u` must be a tensor, got list"),
        wrong("delta", lambda x: x[..., 1:], r"`delta` must be \[B, D, L\] = \[2, 6, 17\]"),
        wrong("delta", lambda x: x.half(), "`delta` must be torch.float32 like `u`"),
        wrong("z", lambda x: x[:1], r"`z` must be \[B, D, L\]"),
        wrong("z", lambda x: x.to("meta"), "`z` must be on cpu like the input, got meta"),
        wrong("A", lambda x: x.to(torch.complex64), "`A` must be real.*complex state matrices"),
        wrong("A", lambda x: x.half(), "`A` must be torch.float32"),
        wrong("A", lambda x: x[1:], r"`A` must be \[D, N\] = \[6, 4\], got \[5, 4\]"),
        wrong("A", lambda x: x[:, :0], "`A` must be .*without empty axes"),
        wrong("B", lambda x: x[0, 0], r"\[B, G, N, L\]"),
        wrong("B", lambda x: x[:, :1], r"`B` must be \[B, N, L\] = \[2, 4, 17\]"),
        wrong("B", lambda x: x.unsqueeze(1).repeat(1, 4, 1, 1), "D = 6 divisible by G"),
        wrong("C", lambda x: x[0, :, :6].T.half(), "like `A`, as it is constant"),
        wrong("C", lambda x: x.double(), "`C` must be torch.float32 like `u`"),
        wrong("D", lambda x: x[:, None], r"`D` must be \[D\] = \[6\]"),
        wrong("delta_bias", lambda x: x.bfloat16(), "`delta_bias` must be torch.float32"),
        wrong("initial_state", lambda x: x.mT, r"`initial_state` must be \[B, D, N\]"),
        wrong("seq_idx", lambda x: x[:, 1:], r"`seq_idx` must be \[B, L\] = \[2, 17\]"),
        wrong("seq_idx", lambda x: x.float(), "`seq_idx` must be integers"),
    ],
)
def test_wrong_arguments_of_the_scan(name, change, message):
    a = scan_arguments(dtype=torch.float32, packed=True)
    with pytest.raises(InvalidArgumentError, match=message):
        selective_scan(**{**a, name: change(a[name])})


def test_b_and_c_of_different_group_counts_are_refused():
    a = scan_arguments(b_form="grouped", c_form="grouped", groups=2)
    with pytest.raises(InvalidArgumentError, match="`C` must be of 2 groups like `B`"):
        selective_scan(**{**a, "C": a["C"][:, [0, 1, 0]]})


@pytest.mark.parametrize(
    "name, change, message",
    [
        wrong("x", lambda x: x[0], r"`x` must be \[B, H, W, D\], 4 axes"),
        wrong("x", lambda x: x[:, :0], "without empty axes"),
        wrong("x", lambda x: x.int(), "fp16, bf16, fp32 or fp64"),
        wrong("proj", lambda x: x[..., 1:], r"`proj` must be \[B, H, W, 4, R \+ 2N\]"),
        wrong("proj", lambda x: x.bfloat16(), "`proj` must be torch.float32 like `x`"),
        wrong("A", lambda x: x[:2], r"`A` must be \[4, D, N\] = \[4, 4, 2\]"),
        wrong("A", lambda x: x.to(torch.complex64), "`A` must be real"),
        wrong("dt_weight", lambda x: x.double(), "`dt_weight` must be torch.float32"),
        wrong("dt_weight", lambda x: x[..., :0], "`dt_weight` .*without empty axes"),
        wrong("dt_bias", lambda x: x[0], r"`dt_bias` must be \[4, D\]"),
        wrong("D", lambda x: x.sum(0), r"`D` must be \[4, D\]"),
        wrong("D", lambda x: 1.0, "`D` must be a tensor, got float"),
    ],
)
def test_wrong_arguments_of_the_scan_2d(name, change, message):
    a = scan_2d_arguments(dtype=torch.float32)
    with pytest.raises(InvalidArgumentError, match=message):
        selective_scan_2d(**{**a, name: change(a[name])})
