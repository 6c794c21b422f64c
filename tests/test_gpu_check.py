"""The check for the first minutes on a GPU, rehearsed without one."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import gpu_check
import pytest

# A machine with a GPU may lack these.
ABSENT = ("constriction", "bjontegaard", "pytorch_msssim")
# `rest` is `tests` with the other half of the tests.
REHEARSED = [stage for stage in gpu_check.STAGES if stage != "rest"]


def test_gpu_tests_need_no_optional_package(root):
    """They are collected without them, and skip for want of a GPU and for no other reason."""
    absent = "".join(f"sys.modules[{name!r}] = None;" for name in ABSENT)
    code = f"import sys; {absent} import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    # No test goes on to run here, so what a GPU would need may be missing.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "CMAMBA_REQUIRE_TRITON": ""}
    ended = subprocess.run(
        [sys.executable, "-c", code, "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    reasons = [line for line in ended.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(reasons) >= 30
    assert all(line.endswith(("needs a CUDA device", "no CUDA device")) for line in reasons)
    assert "passed" not in ended.stdout and "failed" not in ended.stdout


@pytest.fixture(scope="module")
def rehearsed(root, tmp_path_factory, require_triton):
    """The results of a rehearsal: exit status, output and folder."""
    out = tmp_path_factory.mktemp("gpu") / "check"
    command = [sys.executable, "tools/gpu_check.py", "--rehearse", "--minutes", "30"]
    command += ["--out", str(out), "--stages", *REHEARSED]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    return ended, out


def result_of(rehearsed, stage):
    ended, out = rehearsed
    assert (out / f"{stage}.json").exists(), ended.stdout + (out / f"{stage}.txt").read_text()
    return json.loads((out / f"{stage}.json").read_text())


def test_every_stage_leaves_a_result(rehearsed):
    ended, out = rehearsed
    summary = json.loads((out / "summary.json").read_text())
    ways = {stage: s["status"] for stage, s in summary.items()}
    assert ways == dict.fromkeys(REHEARSED, "ok"), ended.stdout
    assert ended.returncode == 0
    for stage in REHEARSED:
        assert "failed" not in result_of(rehearsed, stage)


def test_kernels_are_compiled_and_the_scan_is_theirs(rehearsed):
    assert result_of(rehearsed, "compile")["kernels"] > 0
    assert result_of(rehearsed, "backend")["auto"] == "triton"
    rows = result_of(rehearsed, "profile")["results"]
    assert {(r["backend"], r["mode"]) for r in rows if r["status"] == "ok"} == {
        (backend, mode) for backend in ("triton", "vmamba-pipeline") for mode in ("forward", "both")
    }


def test_the_tests_that_come_first_are_some_of_all(rehearsed):
    (line,) = result_of(rehearsed, "tests")["summary"]
    skipped, deselected = (int(n) for n in re.findall(r"(\d+) (?:skipped|deselected)", line))
    assert 40 <= skipped <= 60 and deselected >= 100


def test_codec_exchange_and_steps_are_measured(rehearsed):
    codec = result_of(rehearsed, "codec")
    for half in ("encode", "decode"):
        assert codec[half]["median_seconds"] > 0
        assert 0 < codec[half]["entropy_coder_share"] < 1
    files = result_of(rehearsed, "exchange")
    assert len(files) == 6
    assert all(f["symbols"] > 1000 and f["mismatched_symbols"] == 0 for f in files.values())
    (step,) = result_of(rehearsed, "step")["steps"]
    assert step["images_per_second"] > 0 and sum(step["share_of_operators"].values()) > 0.9


def arguments(tmp_path, **changes):
    given = {"out": tmp_path, "minutes": 1.0, "stages": list(gpu_check.STAGES), "rehearse": True}
    return argparse.Namespace(**{**given, "stage": None, **changes})


def test_nothing_is_measured_on_another_backend(tmp_path, monkeypatch):
    run = []

    def run_one(args, name, seconds):
        run.append(name)
        return "failed" if name == "backend" else "ok"

    monkeypatch.setattr(gpu_check, "run_one", run_one)
    assert gpu_check.run_all(arguments(tmp_path)) == 1
    assert run == ["machine", "compile", "backend"]


def test_cuda_tensors_on_chunked_fail_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.dispatch, "choose", lambda *_: "chunked")
    backends = gpu_check.dispatch.BACKENDS
    missing = replace(backends["triton"], refusal=lambda *_: "the module is missing")
    monkeypatch.setitem(backends, "triton", missing)
    assert gpu_check.run_stage(arguments(tmp_path, stage="backend")) == 1
    failed = json.loads((tmp_path / "backend.json").read_text())["failed"]
    assert failed == "the module is missing"


def test_a_stage_that_crashes_or_hangs_ends_no_other(tmp_path, monkeypatch):
    """Each runs in a process of its own, with its share of the time."""
    script = tmp_path / "stages.py"
    script.write_text(
        "import os, sys, time\n"
        "stage = sys.argv[sys.argv.index('--stage') + 1]\n"
        "print('began', flush=True)\n"
        "if stage == 'tests': os.abort()\n"
        "if stage == 'profile': time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "STAGES", {n: (None, 0.1) for n in gpu_check.STAGES})
    assert gpu_check.run_all(arguments(tmp_path)) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    ended = {stage: result["status"] for stage, result in summary.items()}
    assert ended["tests"] == "failed" and ended["profile"] == "out of time"
    assert ended["codec"] == ended["exchange"] == ended["step"] == "ok"
    assert (tmp_path / "profile.txt").read_text() == "began\n"


def test_warnings_of_other_versions_fail_no_test(root, tmp_path):
    """Where the project's own run makes them errors."""
    test = tmp_path / "test_warns.py"
    test.write_text(
        "import warnings, pytest\n"
        "@pytest.mark.gpu\n"
        "def test_warns(): warnings.warn('old', DeprecationWarning)\n"
    )
    command = [*gpu_check.pytest_command([str(test)], "warns", 1), "-c", root / "pyproject.toml"]
    lenient = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert lenient.returncode == 0 and "1 passed" in lenient.stdout, lenient.stdout
    at = command.index("-W")
    strict = subprocess.run(command[:at] + command[at + 2 :], cwd=root, capture_output=True)
    assert strict.returncode == 1


def test_no_stage_begins_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_one", lambda *_: pytest.fail("was run"))
    assert gpu_check.run_all(arguments(tmp_path, minutes=0.05)) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["machine"]["status"] == "no time left"


def test_margins_are_sorted_by_their_share_of_the_bound():
    lines = [
        json.dumps({"test": test, "name": "y", "error": error, "bound": bound})
        for test, error, bound in (("a", 1.0, 4.0), ("b", 3.0, 4.0), ("c", 0.0, 0.0))
    ]
    shares = gpu_check.shares_of_bound(lines)
    assert [(one["test"], one["share"]) for one in shares] == [("b", 0.75), ("a", 0.25), ("c", 0)]
