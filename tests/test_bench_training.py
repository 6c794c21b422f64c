"""The command that measures how fast training goes."""

import json

import pytest
from codec_helpers import SMALL
from training_helpers import make_images

from tools import bench_training


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / "photos")
    (tmp_path / "config.json").write_text(SMALL.to_json())
    return tmp_path


def run(folder, *more: str) -> int:
    arguments = ["--config", str(folder / "config.json"), *more]
    written = ["--json", str(folder / "a.json"), "--markdown", str(folder / "a.md")]
    return bench_training.main([*arguments, *written])


def test_the_reference_is_spared_large_crops(folder, monkeypatch):
    """Unless `--sizes` asks for them."""
    asked = []
    monkeypatch.setattr(bench_training, "measure", lambda *job: asked.append(job[:3]))
    assert run(folder, "--backends", "chunked", "reference") == 1  # nothing was measured
    assert asked == [("chunked", 128, 8), ("chunked", 512, 2), ("reference", 128, 8)]


@pytest.mark.slow
def test_a_training_is_measured(folder, capsys):
    asked = ["--backends", "chunked", "--sizes", "64x2", "--cuda-graph"]
    assert run(folder, str(folder / "photos"), *asked) == 0
    found = json.loads((folder / "a.json").read_text())
    (row,) = found["rows"]
    assert (row["backend"], row["crop"], row["batch"]) == ("chunked", 64, 2)
    assert row["images_per_second"] > 0
    assert row["images_per_second_with_graph"] is None  # there is none on a CPU
    for shares in (row["share"], row["share_of_operators"]):
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)
        assert all(0 <= share < 1 for share in shares.values())
    assert set(row["share_of_operators"]) == {"entropy model", "scan", "convolution", "rest"}
    assert row["share_of_operators"]["scan"] > 0 and row["share"]["backward"] > 0
    page = (folder / "a.md").read_text()
    assert "| images/s | with a CUDA graph | data |" in page
    assert "| `chunked` | 2 of 64x64 |" in page and page in capsys.readouterr().out


@pytest.mark.slow
def test_the_backend_is_the_one_that_is_asked_for(folder, capsys, monkeypatch):
    """An environment in which it cannot be had makes the training fail, and the command with it."""
    monkeypatch.setattr(bench_training, "BACKENDS", ("chunked", "nonsense"))
    assert run(folder, "--backends", "nonsense", "--sizes", "64x2") == 1
    error = capsys.readouterr().err
    assert "nonsense, 2 crops of 64" in error and "CMAMBA_SCAN_BACKEND" in error
    assert not (folder / "a.json").exists()


@pytest.mark.parametrize("arguments", [["none"], [".", "--sizes", "64"], [".", "--sizes", "axb"]])
def test_wrong_arguments(arguments):
    with pytest.raises(SystemExit) as stopped:
        bench_training.main(arguments)
    assert stopped.value.code == 2
