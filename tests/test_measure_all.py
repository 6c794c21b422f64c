"""The command for all results: what runs, in which order, what a failure or Ctrl-C leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import measure_all
import pytest
from codec_helpers import make_image
from PIL import Image

# A tool that notes its arguments, and then does what its name is told to do in the environment.
TOOL = """
import os, pathlib, sys, time
name = pathlib.Path(__file__).stem
with open({log!r}, "a") as log:
    log.write(" ".join([name, *sys.argv[1:]]) + "\\n")
what = os.environ.get(name, "0")
if what == "wait":
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(int(what))
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch) -> Path:
    """A folder of stand-ins for the tools; `log` beside it, where each notes that it was run."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for commands in measure_all.commands_of(tmp_path, tmp_path, others=[tmp_path]).values():
        for tool, *_ in commands:
            assert (measure_all.TOOLS / tool).is_file()
            (folder / tool).write_text(TOOL.format(log=str(tmp_path / "log")))
    monkeypatch.setattr(measure_all, "TOOLS", folder)
    return folder


@pytest.fixture
def arguments(tools: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "images").mkdir()
    return [str(tmp_path / "images"), "--into", str(tmp_path / "results")]


def ran(tmp_path: Path) -> list[str]:
    """What the tools were called with, in their order."""
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_stages_run_in_order_and_write_into_one_folder(arguments, tmp_path, capsys):
    assert measure_all.main(arguments) == 0
    lines = ran(tmp_path)
    expected = ["eval_rd"] * 2 + ["plot_rd"] * 3 + ["complexity"] * 2
    expected += ["analyze", "report", "bench_cpu", "bench_training"]
    assert [line.split()[0] for line in lines] == expected
    written = [re.findall(r"(?:-o|--json|--markdown) (/\S+)", line) for line in lines]
    assert all(Path(path).parent == tmp_path / "results" for paths in written for path in paths)
    assert all(written) and len({path for paths in written for path in paths}) == len(lines) + 2
    assert "--qualities 1:8:0.1 --codecs --brief" in lines[1]
    printed = capsys.readouterr().out
    assert "8 of 8 stages are done" in printed and "[3/8] plots" in printed


def test_stages_are_chosen_and_arguments_passed_on(arguments, tmp_path):
    more = ["--only", "large", "analyze", "fine", "--limit", "3", "--model", "mine"]
    assert measure_all.main([*arguments, *more]) == 0
    fine, analyze, large = ran(tmp_path)
    assert fine.startswith("eval_rd") and fine.endswith("kodak_mine_fine.json")
    for line in (fine, analyze):
        assert "--limit 3 --model mine" in line
    assert large.startswith("bench_cpu --only large")


def test_new_weights_renew_their_rows_and_reuse_the_others(arguments, tmp_path):
    assert measure_all.main([arguments[0], "--weights"]) == 0
    lines = ran(tmp_path)
    expected = ["eval_rd", *["plot_rd"] * 3, "report", "readme_tables"]
    assert [line.split()[0] for line in lines] == expected
    result = measure_all.BENCHMARKS / "kodak_tiny.json"
    assert lines[0].endswith(f"--model tiny --reuse {result} -o {result}")


def test_further_folders_get_results_of_their_own(arguments, tmp_path):
    for name in ("CBSD68", "Urban"):
        (tmp_path / name).mkdir()
    folders = [str(tmp_path / name) for name in ("CBSD68", "Urban")]
    results = tmp_path / "results"
    results.mkdir()
    (results / "urban_tiny.json").touch()
    assert measure_all.main([*arguments, "--only", "others", "--others", *folders]) == 0
    for line, folder, name in zip(ran(tmp_path), folders, ("cbsd68", "urban"), strict=True):
        assert line.startswith(f"eval_rd {folder} --model tiny --brief")
        assert line.endswith(f"-o {results / name}_tiny.json") and "--reuse" not in line
    # New weights reuse what there is of the other codecs.
    commands = measure_all.commands_of(
        tmp_path, results, reuse=True, others=list(map(Path, folders))
    )
    assert ["--reuse" in command for command in commands["others"]] == [False, True]


def test_a_failure_is_named_and_stops_only_what_needs_it(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("eval_rd", "1")
    assert measure_all.main([*arguments, "--only", "rd", "plots", "complexity"]) == 1
    assert [line.split()[0] for line in ran(tmp_path)] == ["eval_rd", "complexity", "complexity"]
    printed = capsys.readouterr()
    assert "rd failed: eval_rd.py ended with exit status 1" in printed.err
    assert "plots failed: not run, as it needs rd" in printed.err
    assert "1 of 3 stages are done" in printed.out


@pytest.mark.parametrize(("name", "send"), [("SIGINT", os.killpg), ("SIGTERM", os.kill)])
def test_a_signal_ends_the_tool_and_says_what_is_left(root, tools, arguments, tmp_path, name, send):
    """Ctrl-C in a terminal goes to all processes of the group, SIGTERM to the one that is named."""
    shutil.copy(measure_all.__file__, tools)
    process = subprocess.Popen(
        [sys.executable, str(tools / "measure_all.py"), *arguments]
        + ["--only", "fine", "complexity", "cpu"],
        env={**os.environ, "PYTHONPATH": str(root), "complexity": "wait"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 100
        while not any("complexity" in line for line in ran(tmp_path)):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)  # the tool is about to wait
        send(process.pid, signal.Signals[name])
        _, error = process.communicate(timeout=100)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "for what is left say --only complexity cpu" in error
    with pytest.raises(ProcessLookupError):  # nobody is left in the group
        os.killpg(process.pid, 0)


def test_a_tool_that_was_interrupted_alone_ends_the_run(arguments, monkeypatch, capsys):
    monkeypatch.setenv("eval_rd", "130")
    assert measure_all.main([*arguments, "--only", "rd", "complexity"]) == 130
    assert "say --only rd complexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{images}", "--only", "all"], "'all'"),
        (["{images}", "--weights", "--into", "trial"], "without --only and --into"),
        # It would put other results into the repository's pages.
        (["{images}", "--into", "trial", "--only", "tables"], "no --into"),
        # Results of less do not replace those of the repository.
        (["{images}", "--limit", "3"], "say --into another folder"),
        (["{images}", "--model", "mine"], "say --into another folder"),
        (["{images}/none"], "must be folders of images"),
        (["{images}", "--others", "{images}/none"], "must be folders of images"),
        (["{images}", "--only", "others"], "needs folders"),
        (["{images}", "--others", "{images}", "{images}"], "of different names"),
    ],
)
def test_wrong_arguments_are_refused(arguments, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as stopped:
        measure_all.main([text.format(images=arguments[0]) for text in given])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not ran(tmp_path)


@pytest.mark.slow
def test_real_tools_on_two_small_images(model_dir, tmp_path, monkeypatch):
    """Rates, plots and report of a small model; no folder of this machine is in any of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(make_image(256, 256, seed)).save(images / f"{seed}.png")
    into = tmp_path / "results"
    stages = ["--only", "rd", "plots", "report"]
    given = [str(images), "--into", str(into), "--model", model_dir, *stages]
    assert measure_all.main(given) == 0
    found = {path.name for path in into.iterdir()}
    plots = {"kodak_psnr.png", "kodak_ms_ssim.png", "kodak_published.png"}
    assert found == {
        "kodak_model0.json",
        "report.html",
        "crops.png",
        *plots,
        *(f"{p}.json" for p in plots),
    }
    measured = json.loads((into / "kodak_model0.json").read_text())
    assert {"cmamba", "jpeg420", "jpeg444", "meta"} <= set(measured)
    assert len(measured["cmamba"]["results"]["bpp"]) == 8
    for path in into.iterdir():
        if path.suffix != ".png":
            assert str(tmp_path) not in path.read_text()
    for plot in plots:
        with Image.open(into / plot) as image:
            image.load()
        assert (into / plot).stat().st_size < 150_000
