"""Rate-distortion plots: what is drawn is what the files say, and the numbers lie beside it."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot_rd
import pytest
import rd_curves
from PIL import Image
from rd_helpers import MS_SSIM, VTM, write_anchors, write_results

BPP, PSNR = (list(values) for values in zip(*VTM, strict=True))


@pytest.fixture
def ours(tmp_path: Path) -> str:
    return f"{write_results(tmp_path)}:cmamba"


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return write_anchors(tmp_path)


def test_plot_and_numbers(ours, anchors, tmp_path, capsys):
    output = tmp_path / "plot.png"
    arguments = [ours, "--anchor", f"{anchors}:kodak/VTM-9.1", "-o", str(output)]
    assert plot_rd.main(arguments) == 0
    assert "VTM-9.1 from table 7" in capsys.readouterr().out
    with Image.open(output) as image:
        assert image.mode == "P"  # few colours, a small file
        assert image.width > 500 and np.array(image.convert("L")).std() > 10
    numbers = json.loads((tmp_path / "plot.png.json").read_text())
    assert numbers["anchor"]["label"] == "VTM-9.1"
    mine, anchor = numbers["curves"]
    assert mine["bpp"] == pytest.approx([1.2 * r for r in BPP])
    assert mine["db"] == PSNR == anchor["db"]
    assert mine["bd_rate_percent"] == pytest.approx(20) and anchor["bd_rate_percent"] is None
    assert anchor["source"] == "table 7"


def test_lines_labels_and_axes(ours, anchors):
    curves = [rd_curves.load_curve(spec) for spec in (ours, f"{anchors}:kodak/VTM-9.1")]
    figure, _ = plot_rd.draw(curves, "psnr", anchor=curves[1], bpp=(0.24, 0.6))
    (axes,) = figure.axes
    mine, anchor = axes.lines
    assert list(anchor.get_xdata()) == BPP and list(mine.get_ydata()) == PSNR
    assert mine.get_linestyle() == "-" and anchor.get_linestyle() == "--"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["CMamba <random> (+20.0 %)", "VTM-9.1"]
    assert axes.get_title() == "kodak" and axes.get_xlim() == (0.24, 0.6)
    low, high = axes.get_ylim()
    assert 31 < low < 31.3 and 34.3 < high < 34.5  # points at 0.25 and 0.49 bpp of the anchor


def test_ms_ssim_is_in_db(ours, tmp_path):
    output = tmp_path / "plot.svg"
    arguments = [ours, "--metric", "ms-ssim", "-o", str(output)]
    assert plot_rd.main(arguments) == 0
    numbers = json.loads((tmp_path / "plot.svg.json").read_text())
    assert numbers["curves"][0]["db"] == pytest.approx([-10 * np.log10(1 - x) for x in MS_SSIM])
    first = output.read_bytes()
    assert b"<svg" in first
    assert plot_rd.main(arguments) == 0
    assert output.read_bytes() == first


def test_curves_of_different_images_are_labelled(anchors):
    curves = [rd_curves.load_curve(f"{anchors}:{name}/VTM-9.1") for name in ("kodak", "clic")]
    figure, _ = plot_rd.draw(curves, "psnr")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["VTM-9.1 on kodak", "VTM-9.1 on clic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ours}", "-o", "plot.txt"], "svg"),
        (["{ours}", "-o", "no/such/folder/plot.png"], "no/such/folder"),
        (["{ours}/jpeg", "-o", "{folder}/plot.png"], "cmamba"),
        (["{anchors}", "--metric", "ms-ssim", "-o", "{folder}/plot.png"], "has no ms-ssim"),
    ],
)
def test_wrong_arguments_are_refused(ours, anchors, tmp_path, capsys, arguments, message):
    given = [text.format(ours=ours, anchors=anchors, folder=tmp_path) for text in arguments]
    with pytest.raises(SystemExit):
        plot_rd.main(given)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("plot*"))


@pytest.mark.parametrize("tool", ["bd_rate", "plot_rd", "eval_rd", "analyze", "report"])
def test_help_explains(root, tool):
    """As a command of its own; it must not need matplotlib or scipy."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['scipy'] = None;"
        f"import {tool}; {tool}.main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root / "tools", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"python tools/{tool}.py" in done.stdout


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("plot_rd", ["{ours}", "-o", "{folder}/plot.png"]),
        ("bd_rate", ["{anchors}:kodak/VTM-9.1", "{ours}"]),
        ("analyze", ["{images}", "-o", "{folder}/analysis"]),
    ],
)
def test_a_missing_extra_is_named_before_any_work(
    ours, anchors, tmp_path, monkeypatch, capsys, tool, arguments
):
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    places = {"ours": ours, "anchors": anchors, "folder": tmp_path, "images": images}
    for name in ("matplotlib", "matplotlib.figure", "scipy", "scipy.interpolate"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(tool).main([text.format(**places) for text in arguments])
    assert stopped.value.code == 2 and ".[eval]" in capsys.readouterr().err
