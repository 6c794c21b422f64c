"""Rate-distortion plots: what is drawn is what the files say, and the numbers lie beside it."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot_rd
import pytest
import rd_curves
from PIL import Image

BPP = [0.1, 0.2, 0.4, 0.8]
PSNR = [28.0, 31.0, 34.0, 37.0]
MS_SSIM = [0.9, 0.99, 0.999, 0.9999]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "rd.json"
    results = {"bpp": [2 * r for r in BPP], "psnr-rgb": PSNR, "ms-ssim-rgb": MS_SSIM}
    content = {
        "cmamba": {"name": "CMamba tiny", "results": results},
        "meta": {"pictures": {"folder": "kodak"}},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.json"
    curve = {"bpp": BPP, "psnr": PSNR, "source": "table 7"}
    path.write_text(json.dumps({"kodak": {"VTM-9.1": curve}, "clic": {"VTM-9.1": curve}}))
    return path


def test_plot_and_numbers(ours, anchors, tmp_path, capsys):
    output = tmp_path / "plot.png"
    arguments = [str(ours), "--anchor", f"{anchors}:kodak/VTM-9.1", "-o", str(output)]
    assert plot_rd.main(arguments) == 0
    printed = capsys.readouterr()
    assert "VTM-9.1 from table 7" in printed.out and not printed.err
    with Image.open(output) as image:
        assert image.mode == "P"  # few colours, a small file
        assert image.width > 500 and np.array(image.convert("L")).std() > 10
    numbers = json.loads((tmp_path / "plot.png.json").read_text())
    assert numbers["anchor"]["label"] == "VTM-9.1"
    mine, anchor = numbers["curves"]
    assert mine["bpp"] == [2 * r for r in BPP] and mine["db"] == PSNR == anchor["db"]
    assert mine["bd_rate_percent"] == pytest.approx(100) and anchor["bd_rate_percent"] is None
    assert anchor["source"] == "table 7"


def test_what_is_drawn(ours, anchors):
    curves = [rd_curves.load_curve(spec) for spec in (str(ours), f"{anchors}:kodak/VTM-9.1")]
    figure, _ = plot_rd.draw(curves, "psnr", anchor=curves[1], bpp=(0.3, 0.9))
    (axes,) = figure.axes
    mine, anchor = axes.lines
    assert list(mine.get_xdata()) == [2 * r for r in BPP] and list(mine.get_ydata()) == PSNR
    assert mine.get_linestyle() == "-" and anchor.get_linestyle() == "--"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["CMamba tiny (+100.0 %)", "VTM-9.1"]
    assert axes.get_xlim() == (0.3, 0.9)
    low, high = axes.get_ylim()
    assert 30 < low < 31 and 37 < high < 38  # points at 0.4 and 0.8 bpp of ours, and of the anchor


def test_ms_ssim_is_in_db(ours, tmp_path):
    output = tmp_path / "plot.svg"
    assert plot_rd.main([str(ours), "--metric", "ms-ssim", "-o", str(output)]) == 0
    numbers = json.loads((tmp_path / "plot.svg.json").read_text())
    assert numbers["curves"][0]["db"] == pytest.approx([10, 20, 30, 40])
    first = output.read_bytes()
    assert b"<svg" in first
    assert plot_rd.main([str(ours), "--metric", "ms-ssim", "-o", str(output)]) == 0
    assert output.read_bytes() == first


def test_curves_of_different_pictures_are_labelled(ours, anchors, tmp_path, capsys):
    assert plot_rd.main([str(ours), str(anchors), "-o", str(tmp_path / "plot.png")]) == 0
    assert "different pictures: clic, kodak" in capsys.readouterr().err
    figure, _ = plot_rd.draw(rd_curves.load_curves(str(anchors)), "psnr")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["VTM-9.1 on kodak", "VTM-9.1 on clic"]


def test_wrong_arguments_are_refused(ours, anchors, tmp_path, capsys):
    output = str(tmp_path / "plot.png")
    for arguments, message in (
        ([str(ours), "-o", "plot.txt"], ".svg"),
        ([str(ours), "-o", "no/such/folder/plot.png"], "directory"),
        ([f"{ours}:jpeg", "-o", output], "cmamba"),
        ([str(anchors), "--metric", "ms-ssim", "-o", output], "has no ms-ssim"),
    ):
        with pytest.raises(SystemExit):
            plot_rd.main(arguments)
        assert message in capsys.readouterr().err
    assert not Path(output).exists()


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
        ("bd_rate", ["{anchors}:kodak", "{ours}"]),
        ("analyze", ["{pictures}", "-o", "{folder}/analysis"]),
    ],
)
def test_a_missing_extra_is_named_before_any_work(ours, anchors, tmp_path, tool, arguments):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    places = {"ours": ours, "anchors": anchors, "folder": tmp_path, "pictures": pictures}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure", "scipy", "scipy.interpolate"):
            patch.setitem(sys.modules, name, None)
        with (
            pytest.raises(SystemExit) as stopped,
            contextlib.redirect_stderr(io.StringIO()) as error,
        ):
            importlib.import_module(tool).main([text.format(**places) for text in arguments])
    assert stopped.value.code == 2 and ".[eval]" in error.getvalue()
