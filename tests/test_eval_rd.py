"""Evaluation: what it reports is what lies on disk, and nothing measured is lost."""

import json
from pathlib import Path

import eval_rd
import numpy as np
import pytest
from PIL import Image

import cmamba_ref

PHOTOGRAPH = Path(cmamba_ref.__file__).parent / "data" / "coffee.png"
MODEL = Path(__file__).parent / "golden" / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two crops of a photograph, one of them grey."""
    target = tmp_path / "pictures"
    target.mkdir()
    with Image.open(PHOTOGRAPH) as image:
        image.crop((0, 0, 170, 200)).save(target / "colour.png")
        image.crop((200, 100, 400, 270)).convert("L").save(target / "grey.png")
    return target


def test_report_agrees_with_an_independent_computation(folder, tmp_path):
    output = tmp_path / "rd.json"
    arguments = [str(folder), "--model", str(MODEL), "--qualities", "1", "8", "-o", str(output)]
    assert eval_rd.main(arguments) == 0
    report = json.loads(output.read_text())
    results = report["cmamba"]["results"]
    assert results["quality"] == [1.0, 8.0]

    model = cmamba_ref.CMamba.from_pretrained(MODEL)
    bpp, psnr = [], []
    for name in report["meta"]["pictures"]["names"]:
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        data = cmamba_ref.encode(model, picture, 8)
        decoded = cmamba_ref.decode(data, model)
        bpp.append(len(data) * 8 / (picture.shape[0] * picture.shape[1]))
        error = np.square(picture.astype(float) - decoded).mean()
        psnr.append(20 * np.log10(255 / np.sqrt(error)))
    assert results["bpp"][1] == pytest.approx(np.mean(bpp))
    assert results["psnr-rgb"][1] == pytest.approx(np.mean(psnr))

    jpeg = report["jpeg420"]["results"]
    assert len(jpeg["bpp"]) == len(eval_rd.JPEG_QUALITIES)
    assert jpeg["bpp"] == sorted(jpeg["bpp"]) and jpeg["psnr-rgb"] == sorted(jpeg["psnr-rgb"])
    for key in ("command", "commit", "machine", "versions", "model", "threads"):
        assert report["meta"][key]


def test_bd_rate_of_half_the_bits_is_minus_fifty_per_cent():
    anchor = {"bpp": [0.2, 0.4, 0.8, 1.6], "psnr-rgb": [28.0, 31.0, 34.0, 37.0]}
    half = {"bpp": [0.1, 0.2, 0.4, 0.8], "psnr-rgb": anchor["psnr-rgb"]}
    assert eval_rd.bd_rate(anchor, half) == pytest.approx(-50)
    assert eval_rd.bd_rate(anchor, anchor) == pytest.approx(0, abs=1e-9)


def test_bd_rate_of_curves_apart_is_refused():
    low = {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr-rgb": [20.0, 21.0, 22.0, 23.0]}
    high = {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr-rgb": [30.0, 31.0, 32.0, 33.0]}
    with pytest.raises(ValueError, match="no PSNR"):
        eval_rd.bd_rate(low, high)
    with pytest.raises(ValueError, match="four points"):
        eval_rd.bd_rate({key: values[:3] for key, values in low.items()}, low)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--qualities", "9"], "quality"),
        (["--model", "none"], "config.json"),
        (["-o", "no/such/folder/rd.json"], "directory"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(folder, capsys, change, message):
    with pytest.raises(SystemExit):
        eval_rd.main([str(folder), "--model", str(MODEL), *change])
    assert message in capsys.readouterr().err


def test_small_pictures_are_named(folder, capsys):
    Image.new("RGB", (300, 100)).save(folder / "flat.png")
    with pytest.raises(SystemExit):
        eval_rd.main([str(folder), "--model", str(MODEL)])
    assert "flat.png" in capsys.readouterr().err
