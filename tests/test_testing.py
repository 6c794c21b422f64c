"""`cmamba_ref.testing` for a scan of one's own: what is right passes, what is wrong is named."""

import math

import pytest
import torch

from cmamba_ref import selective_scan, selective_scan_2d, testing

MAKERS = pytest.mark.parametrize("make", [testing.scan_arguments, testing.scan_2d_arguments])


def own_scan(change=lambda y: y):
    """A scan of a user's own, for both signatures; `change` is applied to y."""

    def scan(**arguments):
        if "proj" in arguments:
            return change(selective_scan_2d(**arguments, backend="chunked"))
        y, *last = selective_scan(**arguments, backend="chunked")
        return change(y), *last

    return scan


@MAKERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_correct_scan_passes(make, dtype):
    testing.assert_accurate(own_scan(), make(dtype=dtype))
    testing.assert_accurate("chunked", testing.guarded(make(dtype=dtype)))


@MAKERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * (1 + 1e-4), "y: error .* above the bound"),
        (lambda y: y * math.nan, "y: error inf above the bound"),
        (lambda y: y.double(), "y is torch.float64 and not torch.float32"),
        (lambda y: y + 1e-3 * (y - y.detach()), "grad of .*: error .* above the bound"),
    ],
    ids=["value", "NaN", "type", "gradient"],
)
def test_wrong_scan_fails_by_name(make, change, message):
    with pytest.raises(AssertionError, match=message):
        testing.assert_accurate(own_scan(change), make(dtype=torch.float32))


def test_margin_is_the_used_part_of_the_bound():
    rule = testing.accuracy(own_scan(), testing.scan_2d_arguments(dtype=torch.float32))
    margins = {margin.name: margin for margin in rule.margins()}
    assert margins.keys() >= {"y", "grad of x", "grad of proj", "grad of D"}
    assert all(0 <= m.error <= m.bound and m.is_kept for m in margins.values())
    assert not testing.Margin("y", math.nan, 1.0).is_kept


def test_the_rule_takes_a_result_in_parts():
    oracle = torch.linspace(1, 2, 10, dtype=torch.float64)
    tested = oracle.float()
    rule, parts = testing.AccuracyRule(), testing.AccuracyRule()
    rule.compare("y", tested, tested, oracle)
    for part in (slice(0, 3), slice(3, 10)):
        parts.compare("y", tested[part], tested[part], oracle[part])
    assert parts.margins() == rule.margins()
    parts.compare("y", tested[:1] + 1, tested[:1], oracle[:1])
    with pytest.raises(AssertionError, match="y: error 1 "):
        parts.check()


def test_guards_reveal_stray_reads():
    arguments = testing.guarded(testing.scan_arguments())
    u = arguments["u"]
    beyond = u.as_strided((u.numel() + 1,), (1,), u.storage_offset())
    assert torch.isnan(beyond[-1]) and torch.isfinite(beyond[:-1]).all()
    with testing.poisoned():
        assert torch.isnan(torch.empty_like(u)).all() and torch.isnan(u.new_empty(3)).all()
    assert not torch.isnan(torch.zeros(3).new_empty(3).zero_()).any()
