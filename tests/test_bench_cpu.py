"""The benchmark on the CPU: its figures add up, its limits bite, and its table has everything."""

import contextlib
import json
import os
import subprocess
import sys
import time

import bench_cpu
import numpy as np
import profile_scan
import pytest
import resident
import stage_clock
import torch
from bench_cpu import DECODE, DIRECTIONS, ENCODE, Job, Limits
from profile_scan import Settings, Shape

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig, stages
from cmamba_ref.entropy import rans

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counted on Linux only")


def settings(repeats=1):
    return Settings(CPU, "fp32", bench_cpu.MODES, repeats, seconds=0.01)


@pytest.fixture(scope="module")
def model():
    """A model with scans in every stage that codes a picture in milliseconds."""
    config = CMambaConfig(
        name="mini",
        widths=(4, 4, 4),
        depths=(1, 2, 1),
        latent_channels=8,
        hyper_widths=(4, 4),
        slices=2,
        cae_width=8,
        lrp_widths=(4, 4),
        d_state=1,
        ssm_ratio=1.0,
    )
    torch.manual_seed(0)
    model = CMamba(config).eval()
    model.update()
    return model


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs without a process of their own, which takes seconds to start."""
    monkeypatch.setattr(bench_cpu, "in_fresh_process", lambda call, *arguments: call(*arguments))


# ---------------------------------------------------------------- stages

ANALYSIS = ["g_a other", "g_a convolutions", *(f"g_a blocks at H/{n}" for n in (2, 4, 8))]
ENTROPY = ["h_s (fp64)", "slice loop", "context CAE (fp64)", "context LRP (fp64)", "entropy coder"]
SYNTHESIS = ["g_s other", "g_s convolutions", *(f"g_s blocks at H/{n}" for n in (2, 4, 8))]


def test_stages_are_all_there_and_add_up_to_the_whole(model):
    picture = bench_cpu.photograph(64, 128)
    data, encoding = stage_clock.time_by_stage(model, lambda: cmamba_ref.encode(picture, model))
    decoded, decoding = stage_clock.time_by_stage(model, lambda: cmamba_ref.decode(data, model))
    assert set(encoding.stages) == {*ANALYSIS, "h_a", *ENTROPY, stage_clock.OTHER}
    assert set(decoding.stages) == {*SYNTHESIS, *ENTROPY, stage_clock.OTHER}
    for timing in (encoding, decoding):
        parts = sum(timing.stages.values())
        assert 0.8 * timing.total < parts <= timing.total
        assert 0 < timing.scans < parts
        assert not timing.peaks
    assert data == cmamba_ref.encode(picture, model)
    assert np.array_equal(decoded, cmamba_ref.decode(data, model))


def test_time_goes_to_the_stage_that_takes_it(monkeypatch, model):
    encode, pause = rans.encode, 0.5  # longer than any stage, on a machine under load too

    def slow(*args, **kwargs):
        time.sleep(pause)
        return encode(*args, **kwargs)

    picture = bench_cpu.photograph(64, 64)
    coding = model.latent_coder.float64_modules()
    handle = coding["context"].lrp[1].register_forward_hook(lambda *_: time.sleep(pause))
    monkeypatch.setattr(rans, "encode", slow)
    try:
        _, timing = stage_clock.time_by_stage(model, lambda: cmamba_ref.encode(picture, model))
    finally:
        handle.remove()
    assert 2 * pause <= timing.stages.pop("entropy coder")  # of y and of z
    assert pause <= timing.stages.pop("context LRP (fp64)")
    # LRP lies inside the slice loop, which must not be charged for it.
    assert timing.stages["slice loop"] < pause
    assert max(timing.stages.values()) < pause


def test_nothing_stays_behind(model):
    def broken():
        model.g_a(torch.zeros(1, 3, 64, 64))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage_clock.time_by_stage(model, broken)
    assert isinstance(stages.stage(stages.SCAN), contextlib.nullcontext)
    modules = [*model.modules(), *model.latent_coder.float64_modules().modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@on_linux
def test_memory_goes_to_the_stage_that_takes_it(model):
    picture, mib = bench_cpu.photograph(64, 64), 2**20

    def take(*_):
        torch.zeros(200 * mib, dtype=torch.uint8)  # gone at once

    handle = model.h_a[0].register_forward_pre_hook(take)
    try:
        _, timing = stage_clock.time_by_stage(
            model, lambda: cmamba_ref.encode(picture, model), memory=True
        )
    finally:
        handle.remove()
    peak = timing.peaks.pop("h_a")
    assert peak - max(timing.peaks.values()) > 150 * mib


# ---------------------------------------------------------------- scans and growth


def test_exponent_is_the_slope():
    points = [("a", x, 3 * x**1.5) for x in (1, 2, 8, 64)] + [("b", 4, 1.0), ("b", 4, 2.0)]
    assert bench_cpu.exponents_of(points) == {"a": pytest.approx(1.5)}


def test_scan_names_what_it_leaves_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    section = bench_cpu.measure_scan(Shape(1, 4, 3, 4, 2, 1), settings())
    assert {row["backend"] for row in section["rows"]} == {"chunked", "ref-style"}
    assert all(row["status"] == "ok" for row in section["rows"])
    assert section["left_out"]["mambapy"].startswith("it cannot be imported")
    assert section["inputs_mib"] * 2**20 == 4 * (48 + 4 * 12 * 5 + 4 * 4 * (2 + 1 + 1 + 1))


def test_baselines_are_left_out_where_memory_does_not_suffice(monkeypatch):
    monkeypatch.setattr(bench_cpu, "available_bytes", lambda: 1000)
    section = bench_cpu.measure_scan(Shape(1, 4, 3, 4, 2, 1), settings())
    assert {row["backend"] for row in section["rows"]}.isdisjoint(bench_cpu.BASELINES)
    assert "GiB of memory" in section["left_out"]["ref-style"]


# ---------------------------------------------------------------- the codec


@pytest.mark.parametrize(("width", "height"), [(64, 64), (700, 450), (1300, 100)])
def test_photographs_are_continued_by_mirroring(width, height):
    photograph = bench_cpu.photograph(600, 400)
    picture = bench_cpu.photograph(width, height)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    rows, columns = min(height, 400), min(width, 600)
    assert np.array_equal(picture[:rows, :columns], photograph[:rows, :columns])
    if width > 600:
        assert np.array_equal(picture[:, 600], picture[:, 599])
        assert np.array_equal(picture[:, 650], picture[:, 549])


def test_what_is_reported_of_a_picture(model, tmp_path, in_this_process):
    model.save_pretrained(tmp_path)
    data = b""
    for direction in DIRECTIONS:
        job = Job(str(tmp_path), 64, 128, direction, data, 1, repeats=3, seconds=0.01)
        run, data = bench_cpu.run_job("mini", job)
        assert (run["model"], run["direction"], run["status"]) == ("mini", direction, "ok")
        assert run["repeats"] == 3 and run["first_s"] > 0
        assert run["bpp"] == pytest.approx(8 * len(data) / (64 * 128))
        assert sum(stage["share"] for stage in run["stages"].values()) == pytest.approx(1, abs=0.25)
        if resident.peak_bytes() is not None:
            beyond = max(stage["peak_mib"] for stage in run["stages"].values())
            assert run["peak_mib"] >= run["loaded_mib"] + beyond - 1e-6


def test_a_process_that_takes_too_much_ends_and_is_a_result():
    limits = Limits(seconds=0.01, gib=100)  # loading the model takes longer
    run, data = bench_cpu.run_job("tiny", Job("tiny", 64, 64, ENCODE, b"", 1, 0, 1, limits))
    assert run["status"].startswith("failed: the process ended") and data == b""
    run, _ = bench_cpu.run_job("tiny", Job("tiny", 64, 64, DECODE, data, 1, 0, 1, limits))
    assert run["status"].startswith("not run")
    assert len(bench_cpu.failures({"codec": {"runs": [run]}})) == 1


def test_watch_ends_a_process(monkeypatch):
    ended = []

    def end(status):
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(bench_cpu, "resident_bytes", lambda: 4 * 2**30)
    with pytest.raises(SystemExit):
        bench_cpu.end_beyond(Limits(seconds=1000, gib=2))
    with pytest.raises(SystemExit):
        bench_cpu.end_beyond(Limits(seconds=0.01, gib=1000))
    assert ended == [1, 1]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(0.0, 100), "failed: more than 0 s"),
        (Limits(100, 0.01), "failed: more than 0.01 GiB"),
    ],
)
def test_large_pictures_have_limits(monkeypatch, limits, reason):
    def code(name, job):
        run = {
            "model": name, "width": job.width, "height": job.height, "direction": job.direction,
            "status": "ok", "first_s": 1.0, "median_s": 1.0, "peak_mib": 100.0,
        }  # fmt: skip
        return run, b"x"

    monkeypatch.setattr(bench_cpu, "run_job", code)
    monkeypatch.setattr(bench_cpu, "model_sources", lambda names, folder: {n: n for n in names})
    section = bench_cpu.measure_large((64, 64), settings(), limits)
    assert [run["status"] for run in section["runs"]] == [reason, reason]
    assert len(bench_cpu.failures({"large": section})) == 2
    generous = bench_cpu.measure_large((64, 64), settings(), Limits(100, 100))
    assert not bench_cpu.failures({"large": generous})


# ---------------------------------------------------------------- whole commands, the table


def test_sections_are_kept_and_the_table_has_them(monkeypatch, tmp_path, in_this_process, capsys):
    path, page = tmp_path / "cpu.json", tmp_path / "cpu.md"
    monkeypatch.setattr(bench_cpu, "BASELINES", ("ref-style",))
    arguments = ["--quick", "--repeats", "1", "--json", str(path), "--markdown", str(page)]
    for section in ("scan", "growth", "codec"):
        assert bench_cpu.main([*arguments, "--only", section]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["scan", "growth", "codec"]
    for name, section in sections.items():
        assert section["meta"]["command"].endswith(f"--only {name}")
        assert section["meta"]["quick"]
    assert [(run["width"], run["direction"]) for run in sections["codec"]["runs"]] == [
        (width, direction) for width in (64, 128) for direction in DIRECTIONS
    ]
    text = page.read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    assert {len(line) for line in table} == {5} and "these figures mean nothing" in text
    cases = {(section, case): figures for section, case, *figures in table}
    row = sections["scan"]["rows"][0]
    assert cases["scan", f"chunked {row['shape']}, forward"][0] == profile_scan.as_text(
        row["median_ms"] / 1e3
    )
    assert ("growth", "chunked 1x6x6x4x2x1, both") in cases
    assert cases["codec", "tiny 64x64 encode: h_a"][1].endswith("%")
    assert "Exponent of the time, positions, forward" in text

    page.unlink()
    before = path.read_bytes()
    assert bench_cpu.main([*arguments, "--only"]) == 0
    assert page.read_text() == text and text in capsys.readouterr().out
    assert json.loads(path.read_bytes()) == json.loads(before)


def test_the_results_in_the_repository_make_their_table(root):
    """What readers of the JSON rely on, whichever version wrote it."""
    sections = bench_cpu.read_sections(root / "benchmarks" / "cpu.json")
    assert set(sections) == set(bench_cpu.SECTIONS)
    text = bench_cpu.to_markdown(sections)
    assert text == (root / "benchmarks" / "cpu.md").read_text()


def test_whole_commands_are_timed_warm(monkeypatch):
    commands = []
    run = subprocess.run

    def record(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(bench_cpu.subprocess, "run", record)
    section = bench_cpu.measure_startup((64, 64), repeats=1)
    verbs = [next((word for word in command if word in DIRECTIONS), "") for command in commands]
    assert verbs == [""] * 4 + [ENCODE] * 2 + [DECODE] * 2  # the first of each is not timed
    for direction in DIRECTIONS:
        figures = section[direction]
        assert 0 < figures["wall_s"] <= figures["wall_max_s"]
        assert sum(figures["split_s"].values()) == pytest.approx(figures["wall_s"])
        assert figures["split_s"]["imports"] > figures["split_s"]["interpreter"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "all"], "'all'"),
        (["--large-size", "6000"], "WIDTHxHEIGHT"),
        (["--large-size", "0x9"], "above 0"),
        (["--repeats", "0"], "above 0"),
        (["--json", "no/such/folder/cpu.json"], "existing directory"),
        (["--json", "README.md"], "a file that this command wrote"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(monkeypatch, root, capsys, arguments, message):
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as exit_status:
        bench_cpu.main(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
