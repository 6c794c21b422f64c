"""BD-rate: right on curves whose answer is known, as others compute it, and refused elsewhere."""

import json
from pathlib import Path

import bd_rate
import numpy as np
import pytest
import rd_curves
from rd_curves import CurveError
from rd_helpers import VTM, scaled, write_anchors, write_results


def test_half_the_bits_are_minus_fifty_per_cent():
    found = bd_rate.bd_rate(VTM, scaled(VTM))
    assert found.percent == pytest.approx(-50)
    assert (found.low, found.high, found.of_anchor, found.of_test) == (26.1, 37.4, 1, 1)
    assert bd_rate.bd_rate(VTM, VTM).percent == pytest.approx(0, abs=1e-9)


def test_the_order_of_points_does_not_matter():
    assert bd_rate.bd_rate(VTM[::-1], scaled(VTM)[::-1]).percent == pytest.approx(-50)


def test_lines_that_meet_at_one_end():
    """Log-rates 0 and ln(2) t over the same dB: on average ln(2)/2 apart, a factor of sqrt(2)."""
    steps = np.linspace(0, 1, 6)
    anchor = [(np.exp(3 * t), 30 + 8 * t) for t in steps]
    test = [(np.exp((3 + np.log(2)) * t), 30 + 8 * t) for t in steps]
    assert bd_rate.bd_rate(anchor, test).percent == pytest.approx(100 * (2**0.5 - 1))


def test_only_the_common_range_counts():
    """Half the bits where the other codec has points; what the anchor takes below is no matter."""
    line = [(np.exp(k / 3), 30.0 + k) for k in range(9)]
    found = bd_rate.bd_rate([(0.01, 20.0), *line], scaled(line[2:]))
    assert found.percent == pytest.approx(-50)
    assert (found.low, found.high, found.of_test) == (32, 38, 1)
    assert found.of_anchor == pytest.approx(6 / 18)


@pytest.mark.parametrize("seed", range(8))
def test_as_the_package_bjontegaard_has_it(seed):
    oracle = pytest.importorskip("bjontegaard", reason="bjontegaard is not installed").bd_rate
    rng = np.random.default_rng(seed)
    curves = []
    for points in (4 + seed, 5):
        rate = np.cumsum(rng.uniform(0.05, 0.4, points))
        # From 26 or a little more to as much as 34, so that more than half is common to both.
        rises = rng.uniform(0.4, 3, points)
        quality = 26 + rng.uniform(0, 1) + 8 * np.cumsum(rises) / rises.sum()
        curves.append(list(zip(rate, quality, strict=True)))
    expected = oracle(
        *[np.array(column) for curve in curves for column in zip(*curve, strict=True)],
        method="pchip",
        require_matching_points=False,
        min_overlap=0,
    )
    assert bd_rate.bd_rate(*curves).percent == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("anchor", "test", "message"),
    [
        (VTM, VTM[:3], "the test has 3"),
        (VTM[1:4], VTM, "the anchor has 3"),
        (VTM, [(r, q + 12) for r, q in VTM], "no quality that both codecs reach"),
        (VTM, [(r, q + 8) for r, q in VTM], "29% of the smaller curve"),
        (VTM, [*VTM[:3], (0.6, 31.0), (0.8, 35.0)], "that of the test does not"),
        ([*VTM, (1.5, float("inf"))], VTM, "that of the anchor does not"),
    ],
)
def test_refusals(anchor, test, message):
    with pytest.raises(CurveError, match=message):
        bd_rate.bd_rate(anchor, test)


# ---------------------------------------------------------------- files


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return write_results(tmp_path)


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return write_anchors(tmp_path)


def test_command_on_files(ours, anchors, capsys):
    assert bd_rate.main([f"{anchors}:kodak/VTM-9.1", f"{ours}:cmamba"]) == 0
    printed = capsys.readouterr().out
    assert "against VTM-9.1 on kodak, points from table 7" in printed
    assert "| CMamba <random> (rd.json:cmamba) | +20.00 % | 26.10 to 37.40 dB |" in printed


def test_command_names_what_it_refuses(ours, anchors, capsys):
    """All of a group, without the anchor itself; one of them cannot be compared."""
    assert bd_rate.main([f"{anchors}:kodak/VTM-9.1", f"{anchors}:kodak", str(ours)]) == 1
    printed = capsys.readouterr().out
    assert "short" in printed and "the test has 1" in printed and "+20.00 %" in printed
    assert bd_rate.main([f"{ours}:cmamba", f"{anchors}:clic", "--metric", "ms-ssim"]) == 1
    printed = capsys.readouterr().out
    assert "has no ms-ssim" in printed and "other images: clic" in printed


def test_wrong_curves_are_named(ours, anchors, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    ragged, negative = (tmp_path / f"{name}.json" for name in ("ragged", "negative"))
    ragged.write_text(json.dumps({"bpp": [0.1, 0.2], "psnr": [30]}))
    negative.write_text(json.dumps({"bpp": [-0.1, 0.2], "psnr": [30, 31]}))
    for spec, message in (
        (f"{tmp_path}/none.json", "none.json"),
        (str(broken), "must be a JSON file"),
        (str(ragged), "2 bpp, 1 psnr-rgb"),
        (str(negative), "must be positive"),
        (str(anchors), "name one of them"),
        (f"{anchors}:kodak/VTM-1", "kodak/VTM-9.1"),
    ):
        with pytest.raises(SystemExit):
            bd_rate.main([spec, str(ours)])
        assert message in capsys.readouterr().err


def test_a_file_of_compressai_is_one_curve(tmp_path):
    path = tmp_path / "cheng2020.json"
    results = {"bpp": [0.2, 0.1], "psnr-rgb": [30.0, 28.0], "ms-ssim-rgb": [0.99, 0.9]}
    path.write_text(json.dumps({"name": "cheng2020", "description": "", "results": results}))
    curve = rd_curves.load_curve(str(path))
    assert curve.label == "cheng2020"
    assert curve.points("psnr") == [(0.1, 28.0), (0.2, 30.0)]
    assert [quality for _, quality in curve.points("ms-ssim")] == pytest.approx([10, 20])


def test_published_bd_rates_come_back(shared_dir):
    """Those that LALIC's authors state against VTM-9.1, from the points that they publish."""
    path = shared_dir / "rd" / "anchors.json"
    if not path.is_file():
        pytest.skip("no published points in `shared/rd`")
    for dataset, stated in (
        ("kodak", -15.26),
        ("clic2020_pro_valid41", -15.41),
        ("tecnick", -17.63),
    ):
        anchor, test = (
            rd_curves.load_curve(f"{path}:{dataset}/{name}") for name in ("VTM-9.1", "LALIC")
        )
        found = bd_rate.bd_rate(anchor.points("psnr"), test.points("psnr"))
        assert found.percent == pytest.approx(stated, abs=0.02)
