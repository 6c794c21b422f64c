"""The command for all results: what runs, in which order, what a failure or Ctrl-C leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import measure_all
import pytest
from codec_helpers import picture
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
    """Stand-ins for the tools; the file in which each notes that it was run."""
    log = tmp_path / "log"
    folder = tmp_path / "tools"
    folder.mkdir()
    for stage in measure_all.STAGES:
        for tool, *_ in measure_all.Inputs(tmp_path, None, "tiny", tmp_path).commands(stage):
            assert (measure_all.TOOLS / tool).is_file()
            (folder / tool).write_text(TOOL.format(log=str(log)))
    monkeypatch.setattr(measure_all, "TOOLS", folder)
    return log


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "pictures").mkdir()
    return [str(tmp_path / "pictures"), "--into", str(tmp_path / "results")]


def test_stages_run_in_order_and_write_into_one_folder(tools, arguments, tmp_path, capsys):
    assert measure_all.main(arguments) == 0
    ran = tools.read_text().splitlines()
    names = [line.split()[0] for line in ran]
    assert names == ["eval_rd", "eval_rd", *["plot_rd"] * 3, "complexity", "complexity"] + [
        "analyze",
        "report",
        "bench_cpu",
        "bench_training",
    ]
    written = [re.findall(r"(?:-o|--json|--markdown) (/\S+)", line) for line in ran]
    assert all(Path(path).parent == tmp_path / "results" for paths in written for path in paths)
    assert all(written) and len({path for paths in written for path in paths}) == len(ran) + 2
    assert "--qualities 1:8:0.1 --codecs --brief" in ran[1]
    assert not any("large" in line for line in ran)
    printed = capsys.readouterr().out
    assert "8 of 8 stages are done" in printed and "[3/8] plots: done, after" in printed


def test_stages_are_chosen_and_arguments_passed_on(tools, arguments):
    more = ["--only", "large", "analyze", "fine", "--limit", "3", "--model", "mine", "--fresh"]
    assert measure_all.main([*arguments, *more]) == 0
    fine, analyze, large = tools.read_text().splitlines()
    assert fine.startswith("eval_rd") and fine.endswith("kodak_mine_fine.json")
    for line in (fine, analyze):
        assert "--limit 3 --fresh --model mine" in line
    assert large.startswith("bench_cpu --only large")


def test_new_weights_renew_their_rows_and_reuse_the_others(tools, arguments, capsys):
    assert measure_all.main([arguments[0], "--weights"]) == 0
    ran = tools.read_text().splitlines()
    assert [line.split()[0] for line in ran] == [
        "eval_rd", *["plot_rd"] * 3, "report", "readme_tables"
    ]  # fmt: skip
    result = measure_all.BENCHMARKS / "kodak_tiny.json"
    assert ran[0].endswith(f"--model tiny --reuse {result} -o {result}")
    with pytest.raises(SystemExit):
        measure_all.main([*arguments, "--weights"])
    assert "must stand without --only and --into" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # it would put other results into the repository's pages
        measure_all.main([*arguments, "--only", "tables"])
    assert "no --into" in capsys.readouterr().err


def test_a_failure_is_named_and_stops_only_what_needs_it(tools, arguments, monkeypatch, capsys):
    monkeypatch.setenv("eval_rd", "1")
    assert measure_all.main([*arguments, "--only", "rd", "plots", "complexity"]) == 1
    assert [line.split()[0] for line in tools.read_text().splitlines()] == [
        "eval_rd",
        "complexity",
        "complexity",
    ]
    printed = capsys.readouterr()
    assert "rd failed: eval_rd.py ended with exit status 1" in printed.err
    assert "plots failed: not run, as it needs rd" in printed.err
    assert "1 of 3 stages are done" in printed.out


@pytest.mark.parametrize(("name", "send"), [("SIGINT", os.killpg), ("SIGTERM", os.kill)])
def test_a_signal_ends_the_tool_and_says_what_is_left(tools, arguments, tmp_path, name, send):
    """Ctrl-C in a terminal goes to all processes of the group, SIGTERM to the one that is named."""
    code = (
        "import pathlib, sys, measure_all; measure_all.TOOLS = pathlib.Path(sys.argv.pop(1));"
        "sys.exit(measure_all.main())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tools"), *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(measure_all.__file__).parent),
        "complexity": "wait",
    }
    process = subprocess.Popen(
        [*command, "--only", "fine", "complexity", "cpu"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 100
        while "complexity" not in (tools.read_text() if tools.exists() else ""):
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


def test_a_tool_that_was_interrupted_alone_ends_the_run(tools, arguments, monkeypatch, capsys):
    monkeypatch.setenv("eval_rd", "130")
    assert measure_all.main([*arguments, "--only", "rd", "complexity"]) == 130
    assert "say --only rd complexity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--only", "all"], "'all'"),
        (["--limit", "0"], "at least 1"),
        (["--into", "no/such/folder"], "--into"),
    ],
)
def test_wrong_arguments_are_refused(tools, arguments, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        measure_all.main([*arguments, *change])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not tools.exists()


@pytest.mark.parametrize("change", [["--limit", "3"], ["--model", "mine"]])
def test_results_of_less_do_not_replace_those_of_the_repository(tools, arguments, capsys, change):
    with pytest.raises(SystemExit):
        measure_all.main([arguments[0], *change])
    assert "say --into another folder" in capsys.readouterr().err and not tools.exists()


def test_no_folder_of_pictures(tools, tmp_path, capsys):
    with pytest.raises(SystemExit):
        measure_all.main([str(tmp_path / "none")])
    assert "must be a folder of images" in capsys.readouterr().err


@pytest.mark.slow
def test_real_tools_on_two_small_pictures(model_dir, tmp_path, monkeypatch):
    """Rates, plots and report of a small model; no folder of this machine is in any of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for seed in range(2):
        Image.fromarray(picture(256, 256, seed)).save(pictures / f"{seed}.png")
    into = tmp_path / "results"
    stages = ["--only", "rd", "plots", "report"]
    assert (
        measure_all.main([str(pictures), "--into", str(into), "--model", model_dir, *stages]) == 0
    )
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
