"""Tuning: other constants are in force where they are timed, and nowhere afterwards."""

import json
from dataclasses import replace

import profile_scan
import pytest
import torch
import tune_scan
from profile_scan import BACKWARD, BOTH, FORWARD, Shape
from scan_helpers import chunks_of, kernels_are_interpreted

from cmamba_ref.kernels import tiling
from cmamba_ref.ops import selective_scan_2d

TINY = "1x4x3x8x2x1"


@pytest.fixture(autouse=True)
def _small_check(require_triton, monkeypatch):
    small = lambda args: replace(profile_scan.settings_of(args), checked_map=(1, 1, 2))  # noqa: E731
    monkeypatch.setattr(tune_scan, "settings_of", small)
    yield
    assert tiling.constants() == tiling.FIXED


class CountingMeter(profile_scan.CpuMeter):
    """Time depends on nothing but the constants."""

    def __init__(self, cost):
        self.cost, self.timed = cost, []

    def seconds(self, call):
        call()
        self.timed.append(tiling.constants())
        return self.cost(self.timed[-1])


def replace_kernels(monkeypatch, cost=lambda constants: 1.0, fail=lambda constants, x: None):
    """The chunked scan in place of the kernels; `fail` is added or raises. Returns the meter."""

    def scan(x, backend, **kwargs):
        if backend != "triton":
            return selective_scan_2d(x, **kwargs, backend=backend)
        added = fail(tiling.constants(), x)
        y = selective_scan_2d(x, **kwargs, backend="chunked")
        return y if added is None else y + added

    meter = CountingMeter(cost)
    monkeypatch.setattr(profile_scan, "selective_scan_2d", scan)
    monkeypatch.setattr(tune_scan, "meter_for", lambda device: meter)
    return meter


def job(shape, mode, dtype="fp32"):
    settings = profile_scan.Settings(torch.device("cpu"), dtype, (mode,), 1, 0.5)
    candidate = profile_scan.Candidate(tune_scan.FIXED, selective_scan_2d)
    case = profile_scan.Case("test", shape)
    return tune_scan.Job(candidate, case, mode, settings, profile_scan.CpuMeter())


def run(tmp_path, *arguments, status=0, device="cpu"):
    """Rows that the command writes."""
    path = tmp_path / "tune.json"
    arguments = ["--device", device, "--repeats", "1", "--json", str(path), *arguments]
    assert tune_scan.main(arguments) == status
    report = json.loads(path.read_text())
    assert report["meta"]["fixed_rules"] == tiling.constants()._asdict()
    assert report["meta"]["command"].startswith("python tools/tune_scan.py --device")
    return report["results"]


def test_kernels_run_under_other_constants(monkeypatch, tmp_path):
    monkeypatch.setattr(tune_scan, "VALUES", {"programs": (1,)})
    device = "cpu" if kernels_are_interpreted() else "cuda"
    with chunks_of(2):
        rows = run(tmp_path, "--shape", "1x1x3x1x1x1", "--mode", "backward", device=device)
    # Chunks of the forward that the backward did not share would show in the gradients.
    assert [(row["trial"], row["sizes"]["chunks"], row["status"]) for row in rows] == [
        ("fixed rules", 2, "ok"),
        ("programs 1", 1, "ok"),
    ]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] > 0


# ---------------------------------------------------------------- trials


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("mode", profile_scan.MODES)
def test_no_two_trials_are_the_same_call(mode, dtype):
    for case in profile_scan.PRESETS["kernels"]:
        asked = job(case.shape, mode, dtype)
        trials = tune_scan.one_at_a_time(asked)
        sizes = [tune_scan.sizes_of(constants, asked) for constants in trials.values()]
        assert len(set(sizes)) == len(sizes) > 1
        fixed, *others = trials.values()
        assert fixed == tiling.constants()
        for constants in others:
            assert sum(x != y for x, y in zip(constants, fixed, strict=True)) == 1


def test_constants_without_effect_are_not_tried():
    small = Shape(1, 4, 3, 8, 2, 1)
    assert list(tune_scan.one_at_a_time(job(small, FORWARD))) == [tune_scan.FIXED]
    names = list(tune_scan.one_at_a_time(job(small, BOTH)))
    of_steps = ["recompute_steps 2", "recompute_steps 8"]
    of_registers = ["backward_registers 128", "backward_registers 255"]
    assert names == [tune_scan.FIXED, *of_steps, *of_registers]
    trials = tune_scan.one_at_a_time(job(Shape(1, 128, 128, 192, 16, 6), BACKWARD))
    assert {"programs 512", "programs 1024", "backward_tile 1024"} <= set(trials)
    assert "programs 4096" not in trials  # the chunks are the shortest already


def test_the_best_of_each_run_together(monkeypatch, tmp_path, capsys):
    def cost(constants):
        slow = 1.0
        slow *= 0.5 if constants.recompute_steps == 2 else 1
        slow *= {8192: 0.8}.get(constants.programs, 1)
        slow *= 1 if constants.backward_registers == 168 else 2
        return slow * (2 if constants.backward_tile != 512 else 1)

    meter = replace_kernels(monkeypatch, cost)
    # Chunks of one position, so that a small map has enough for `programs` to matter.
    fixed = tiling.FIXED._replace(min_chunk=1)
    with tiling.using(fixed):
        rows = run(tmp_path, "--shape", "64x16x9x2x1x1", "--mode", "both")
    *single, together = rows
    assert together["trial"] == tune_scan.TOGETHER
    expected = fixed._replace(programs=8192, recompute_steps=2)
    assert together["constants"] == expected._asdict()
    assert together["ratio"] == pytest.approx(0.4)
    assert single[0]["constants"] == fixed._asdict() and single[0]["ratio"] == 1
    lines = capsys.readouterr().out.splitlines()
    best = "programs 8192, recompute_steps 2"
    assert f"the fixed rules are within 150.0 % of the best ({best})" in lines
    heading = lines.index(tune_scan.HEADING)
    table = lines[heading + 1 : heading + 1 + len(rows)]
    assert {len(line) for line in table} == {len(tune_scan.HEADING)}
    for line, row in zip(table, rows, strict=True):
        assert line.startswith(row["trial"])
        assert float(line.split()[-1]) == pytest.approx(row["ratio"], rel=1e-3)
    # In turns, and the fixed rules once more in the last round.
    timed = [row["constants"] for row in (*single, single[0], together)]
    assert [constants._asdict() for constants in meter.timed] == timed


# ---------------------------------------------------------------- failures


def test_a_wrong_alternative_is_reported_and_not_timed(monkeypatch, tmp_path, capsys):
    meter = replace_kernels(
        monkeypatch, fail=lambda constants, x: 1e-2 if constants.recompute_steps == 8 else 0
    )
    rows = run(tmp_path, "--shape", TINY, "--mode", "backward", status=1)
    assert [(row["trial"], row["status"]) for row in rows[:3]] == [
        ("fixed rules", "ok"),
        ("recompute_steps 2", "ok"),
        ("recompute_steps 8", "failed"),
    ]
    assert rows[2]["reason"].startswith("y: error 0.01")
    assert rows[2]["median_ms"] is rows[2]["ratio"] is None
    assert [constants.recompute_steps for constants in meter.timed][:2] == [4, 2]
    assert 8 not in [constants.recompute_steps for constants in meter.timed]
    assert "failed: y: error 0.01" in capsys.readouterr().out


def test_a_wrong_gradient_and_lack_of_memory_are_reported(monkeypatch, tmp_path):
    def fail(constants, x):
        if constants.recompute_steps == 2:
            raise torch.OutOfMemoryError("too much")
        return 1e-2 * (x - x.detach()) if constants.recompute_steps == 8 else 0

    replace_kernels(monkeypatch, fail=fail)
    rows = run(tmp_path, "--shape", TINY, "--mode", "backward", status=1)
    assert [row["status"] for row in rows][:3] == ["ok", "out of memory", "failed"]
    assert rows[2]["reason"].startswith("grad of x: error")


def test_nothing_is_tried_where_the_fixed_rules_are_wrong(monkeypatch, tmp_path, capsys):
    meter = replace_kernels(monkeypatch, fail=lambda constants, x: 1e-2)
    (row,) = run(tmp_path, "--shape", TINY, "--mode", "both", status=1)
    assert row["trial"] == tune_scan.FIXED and row["status"] == "failed"
    assert "the fixed rules were not measured" in capsys.readouterr().out
    assert not meter.timed


def test_an_interruption_keeps_the_rows_so_far(monkeypatch, tmp_path):
    def fail(constants, x):
        if constants.recompute_steps == 8:
            raise KeyboardInterrupt

    replace_kernels(monkeypatch, fail=fail)
    modes = ("--mode", "forward", "both")
    (row,) = run(tmp_path, "--shape", TINY, *modes, status=130)
    assert row["mode"] == FORWARD and row["status"] == "ok"


def test_without_the_kernels_nothing_starts(monkeypatch, capsys):
    def scan(x, **kwargs):
        raise profile_scan.BackendUnavailableError("`backend` must be one that runs here")

    monkeypatch.setattr(profile_scan, "selective_scan_2d", scan)
    with pytest.raises(SystemExit) as exit_status:
        tune_scan.main(["--device", "cpu"])
    assert exit_status.value.code == 2
    assert "the kernels cannot run: `backend` must be one" in capsys.readouterr().err
