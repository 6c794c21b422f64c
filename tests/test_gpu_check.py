"""The check for the first minutes on a GPU, rehearsed without one."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
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


@pytest.fixture(autouse=True)
def _keep_sigint():
    """A stage sets what SIGINT does in its process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


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
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "stage = sys.argv[sys.argv.index('--stage') + 1]\n"
        "print('began', flush=True)\n"
        "if stage == 'tests': os.abort()\n"
        "if stage == 'profile':\n"
        "    try: time.sleep(600)\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "STAGES", {n: (None, 0.1) for n in gpu_check.STAGES})
    assert gpu_check.run_all(arguments(tmp_path)) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    ended = {stage: result["status"] for stage, result in summary.items()}
    assert ended["tests"] == "failed" and ended["profile"] == "out of time"
    assert ended["codec"] == ended["exchange"] == ended["step"] == "ok"
    # What is out of time is told first, and can say what it knows.
    assert (tmp_path / "profile.txt").read_text() == "began\ninterrupted\n"


FAILING = """
import os, pytest
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_second(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_third(): assert "CUDA_LAUNCH_BLOCKING" in os.environ, "reached"
"""


def test_an_error_of_cuda_is_traced_to_its_launch(root, tmp_path, monkeypatch, capsys):
    """Failures are named; after one that hides its cause the tests run again, and stop there."""
    (tmp_path / "test_failing.py").write_text(FAILING)
    script = tmp_path / "check.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(root / 'tools')!r}); import gpu_check\n"
        f"gpu_check.TEST_FILES = [{str(tmp_path / 'test_failing.py')!r}]\n"
        "gpu_check.FIRST_TESTS = 'test'\n"
        "sys.exit(gpu_check.main(sys.argv[1:]))\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    (tmp_path / "tests.json").write_text('{"failed": "an earlier run"}')
    assert gpu_check.run_all(arguments(tmp_path, minutes=20, stages=["tests"])) == 1
    failed = json.loads((tmp_path / "tests.json").read_text())
    assert [name.split("::")[1] for name in failed["tests_failed"]] == ["test_second", "test_third"]
    assert f"2 tests failed; see {tmp_path / 'tests'}.txt" in capsys.readouterr().out
    _, again = (tmp_path / "tests.txt").read_text().split("once more")
    assert "test_second FAILED" in again and "test_third" not in again


def test_tests_that_are_interrupted_name_what_failed(root, tmp_path):
    """As when the time is over."""
    test = tmp_path / "test_hangs.py"
    lines = "def test_first(): assert 0\ndef test_second(): time.sleep(600)\n"
    test.write_text(f"import time, pytest\npytestmark = pytest.mark.gpu\n{lines}")
    (tmp_path / "tests.txt").touch()
    code = (
        f"import argparse, pathlib, sys; sys.path.insert(0, {str(root / 'tools')!r})\n"
        f"import gpu_check; gpu_check.TEST_FILES = [{str(test)!r}]\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        "args = argparse.Namespace(out=out, rehearse=True, stage='tests')\n"
        "print(gpu_check.run_tests(args, 'test'))\n"
    )
    with open(tmp_path / "tests.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-uc", code], stdout=output, cwd=root, start_new_session=True
        )
        until = time.monotonic() + 300
        while "test_first FAILED" not in (tmp_path / "tests.txt").read_text():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(100) == 0
    report = (tmp_path / "tests.txt").read_text().splitlines()[-1]
    assert "test_hangs.py::test_first" in report and "1 tests failed" in report


def test_a_stage_that_fails_unexpectedly_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.STAGES, "codec", (lambda args: 1 // 0, 0.1))
    assert gpu_check.run_stage(arguments(tmp_path, stage="codec")) == 1
    (tmp_path / "codec.txt").touch()
    reason = gpu_check.reason_of(tmp_path, "codec")
    assert reason.startswith("ZeroDivisionError: ") and reason.endswith("codec.txt")


def test_training_without_its_graph_fails_the_stage(tmp_path, monkeypatch):
    def train(argv):
        rows = [{gpu_check.WITH_GRAPH: rate} for rate in (90.0, None)]
        (tmp_path / "training_rows.json").write_text(json.dumps({"rows": rows}))
        return 0

    monkeypatch.setattr(gpu_check.bench_training, "main", train)
    assert "failed" not in gpu_check.step(arguments(tmp_path))  # on a CPU there is none
    assert "graph" in gpu_check.step(arguments(tmp_path, rehearse=False))["failed"]


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
