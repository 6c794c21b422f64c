"""The benchmark on the CPU: its figures add up, its limits bite, and its table has everything."""

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import bench_cpu
import numpy as np
import pytest
import resident
import stage_clock
import torch
from bench_cpu import DECODE, DIRECTIONS, ENCODE
from profile_scan import Shape, as_text

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig, stages
from cmamba_ref.codec import memory
from cmamba_ref.entropy import rans

FEW = replace(bench_cpu.SETTINGS, repeats=1)
SCAN = Shape(1, 4, 3, 4, 2, 1)


@pytest.fixture(scope="module")
def model():
    """A model with scans in every stage that codes an image in milliseconds."""
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
    """Coding without a process of its own, which takes seconds to start."""
    monkeypatch.setattr(bench_cpu, "in_fresh_process", lambda call, *arguments: call(*arguments))


# ---------------------------------------------------------------- stages

ANALYSIS = ["g_a other", "g_a convolutions", *(f"g_a blocks at H/{n}" for n in (2, 4, 8))]
ENTROPY = ["h_s (fp64)", "slice loop", "context CAE (fp64)", "context LRP (fp64)", "entropy coder"]
SYNTHESIS = ["g_s other", "g_s convolutions", *(f"g_s blocks at H/{n}" for n in (2, 4, 8))]


def test_stages_are_all_there_and_add_up_to_the_whole(model):
    image = bench_cpu.demo_image(64, 128)
    data, encoding = stage_clock.time_by_stage(model, lambda: cmamba_ref.encode(image, model))
    decoded, decoding = stage_clock.time_by_stage(model, lambda: cmamba_ref.decode(data, model))
    assert set(encoding.stages) == {*ANALYSIS, "h_a", *ENTROPY, stage_clock.OTHER}
    assert set(decoding.stages) == {*SYNTHESIS, *ENTROPY, stage_clock.OTHER}
    for timing in (encoding, decoding):
        parts = sum(timing.stages.values())
        assert 0.8 * timing.total < parts <= timing.total
        assert 0 < timing.scans < parts
        assert not timing.peaks
    assert data == cmamba_ref.encode(image, model)
    assert np.array_equal(decoded, cmamba_ref.decode(data, model))


def test_time_goes_to_the_stage_that_takes_it(monkeypatch, model):
    encode, pause = rans.encode, 0.5  # longer than any stage, on a machine under load too

    def slow(*args, **kwargs):
        time.sleep(pause)
        return encode(*args, **kwargs)

    image = bench_cpu.demo_image(64, 64)
    coding = model.latent_coder.float64_modules()
    handle = coding["context"].lrp[1].register_forward_hook(lambda *_: time.sleep(pause))
    monkeypatch.setattr(rans, "encode", slow)
    try:
        _, timing = stage_clock.time_by_stage(model, lambda: cmamba_ref.encode(image, model))
    finally:
        handle.remove()
    assert 2 * pause <= timing.stages.pop("entropy coder")  # of y and of z
    assert pause <= timing.stages.pop("context LRP (fp64)")
    # LRP lies inside the slice loop, which must not be charged for it.
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


@pytest.mark.skipif(resident.peak_bytes() is None, reason="counted on Linux only")
def test_memory_goes_to_the_stage_that_takes_it(model):
    image, mib = bench_cpu.demo_image(64, 64), 2**20

    def take(*_):
        torch.zeros(200 * mib, dtype=torch.uint8)  # gone at once

    handle = model.h_a[0].register_forward_pre_hook(take)
    try:
        _, timing = stage_clock.time_by_stage(
            model, lambda: cmamba_ref.encode(image, model), memory=True
        )
    finally:
        handle.remove()
    peak = timing.peaks.pop("h_a")
    assert peak - max(timing.peaks.values()) > 150 * mib


# ---------------------------------------------------------------- scans and growth


def test_exponent_is_the_slope():
    points = [("a", x, 3 * x**1.5) for x in (1, 2, 8, 64)] + [("b", 4, 1.0), ("b", 4, 2.0)]
    assert bench_cpu.exponents_of(points) == {"a": pytest.approx(1.5)}


def test_baselines_that_cannot_run_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mambapy", None)
    section = bench_cpu.measure_scan(SCAN, FEW)
    assert {row["backend"] for row in section["rows"]} == {"chunked", "ref-style"}
    assert all(row["status"] == "ok" for row in section["rows"])
    assert section["left_out"]["mambapy"].startswith("it cannot be imported")
    monkeypatch.setattr(memory, "available", lambda: 1000)
    section = bench_cpu.measure_scan(SCAN, FEW)
    assert {row["backend"] for row in section["rows"]} == {"chunked"}
    assert "GiB of memory" in section["left_out"]["ref-style"]


# ---------------------------------------------------------------- the codec


@pytest.mark.parametrize(("width", "height"), [(64, 64), (700, 450), (1300, 100)])
def test_demo_image_is_continued_by_mirroring(width, height):
    original = bench_cpu.demo_image(600, 400)
    image = bench_cpu.demo_image(width, height)
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    rows, columns = min(height, 400), min(width, 600)
    assert np.array_equal(image[:rows, :columns], original[:rows, :columns])
    if width > 600:
        assert np.array_equal(image[:, 600], image[:, 599])
        assert np.array_equal(image[:, 650], image[:, 549])


def test_figures_of_an_image(model, tmp_path):
    model.save_pretrained(tmp_path)
    data, settings = b"", replace(bench_cpu.SETTINGS, repeats=3, seconds=0.01)
    for direction in DIRECTIONS:
        arguments = (str(tmp_path), (64, 128), direction, data, settings, 1)
        run, data = bench_cpu.code_image(*arguments)
        assert run["repeats"] == 3 and run["first_s"] > 0
        assert run["bpp"] == pytest.approx(8 * len(data) / (64 * 128))
        assert sum(stage["share"] for stage in run["stages"].values()) == pytest.approx(1, abs=0.25)
        if resident.peak_bytes() is not None:
            beyond = max(stage["peak_mib"] for stage in run["stages"].values())
            assert run["peak_mib"] >= run["loaded_mib"] + beyond - 1e-6


def test_stages_of_an_unsteady_machine_add_up(monkeypatch, model, tmp_path):
    """Interrupted in another stage each time: the medians of the stages are 3 of 6 s."""
    model.save_pretrained(tmp_path)
    times = iter([(9, 9, 9), (4, 1, 1), (1, 5, 1), (1, 1, 3)])

    def interrupted(model, call, memory=False):
        stages = dict(zip("abc", next(times), strict=True))
        return b"", stage_clock.Timing(sum(stages.values()), stages)

    monkeypatch.setattr(bench_cpu, "time_by_stage", interrupted)
    settings = replace(bench_cpu.SETTINGS, repeats=3, seconds=0)
    run, _ = bench_cpu.code_image(str(tmp_path), (64, 64), DIRECTIONS[0], b"", settings, 1)
    assert (run["repeats"], run["first_s"], run["median_s"]) == (3, 27, 6)
    assert [stage["seconds"] for stage in run["stages"].values()] == [4, 1, 1]
    assert sum(stage["share"] for stage in run["stages"].values()) == pytest.approx(1)


def test_a_process_that_dies_is_a_result(monkeypatch):
    with pytest.raises(BrokenProcessPool):
        bench_cpu.in_fresh_process(os._exit, 1)

    def die(*arguments):
        raise BrokenProcessPool("it died")

    monkeypatch.setattr(bench_cpu, "in_fresh_process", die)
    section = bench_cpu.measure_codec([(64, 64)], ["tiny"], FEW)
    statuses = ["failed: it died", "not run: there is no file"]
    assert [run["status"] for run in section["runs"]] == statuses
    assert bench_cpu.failures(section)[0] == "tiny, 64, 64, encode, failed: it died"
    table = [case for case, *_ in bench_cpu.figures_of(section)]
    assert table == [f"tiny 64x64 {d}: {s}" for d, s in zip(DIRECTIONS, statuses, strict=True)]


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        ({"seconds": 0, "gib": 100}, "failed: more than 0 s"),
        ({"seconds": 100, "gib": 0}, "failed: more than 0 GiB"),
        ({"seconds": 100, "gib": 100}, "ok"),
    ],
)
def test_large_images_have_limits(monkeypatch, limits, status):
    figures = {"first_s": 1.0, "median_s": 1.0, "peak_mib": 100.0}
    monkeypatch.setattr(bench_cpu, "LIMITS", limits)
    monkeypatch.setattr(bench_cpu, "in_fresh_process", lambda *_: (figures, b"x"))
    section = bench_cpu.measure_large((64, 64), FEW)
    assert [run["status"] for run in section["runs"]] == [status, status]
    assert len(bench_cpu.failures(section)) == (0 if status == "ok" else 2)


# ---------------------------------------------------------------- whole commands, the table


def test_sections_are_kept_and_the_table_has_them(monkeypatch, tmp_path, in_this_process, capsys):
    path, page = tmp_path / "cpu.json", tmp_path / "cpu.md"
    monkeypatch.setattr(bench_cpu, "BASELINES", ("ref-style",))
    sections = {
        "scan": lambda: bench_cpu.measure_scan(SCAN, FEW),
        "growth": lambda: bench_cpu.measure_growth([("states", 4, SCAN)] * 2, FEW),
        "codec": lambda: bench_cpu.measure_codec([(64, 64), (128, 64)], ["tiny"], FEW),
    }
    monkeypatch.setattr(bench_cpu, "SECTIONS", sections)
    arguments = ["--json", str(path), "--markdown", str(page)]
    for section in sections:
        assert bench_cpu.main([*arguments, "--only", section]) == 0
    sections = json.loads(path.read_text())["sections"]
    assert list(sections) == ["scan", "growth", "codec"]
    for name, section in sections.items():
        assert section["meta"]["command"].endswith(f"--only {name}")
    runs = [(run["width"], run["direction"]) for run in sections["codec"]["runs"]]
    assert runs == [(width, direction) for width in (64, 128) for direction in DIRECTIONS]
    text = page.read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    assert {len(line) for line in table} == {5}
    cases = {(section, case): figures for section, case, *figures in table}
    row = sections["scan"]["rows"][0]
    seconds = cases["scan", f"chunked {row['shape']}, forward"][0]
    assert seconds == as_text(row["median_ms"] / 1e3)
    assert ("growth", "chunked 1x4x3x4x2x1, both") in cases
    assert cases["codec", "tiny 64x64 encode: h_a"][1].endswith("%")
    assert "Exponent of the time, tiny, encode" in text

    page.unlink()
    assert bench_cpu.main([*arguments, "--only"]) == 0
    assert page.read_text() == text and text in capsys.readouterr().out


def test_the_results_in_the_repository_make_their_table(root):
    """The keys that readers of the JSON rely on are in it, whichever version wrote it."""
    sections = json.loads((root / "benchmarks" / "cpu.json").read_text())["sections"]
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
