"""The trainer: it learns, resumes where it stopped, and exports a model that codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmamba_ref
from tools import train

PHOTOGRAPH = Path(cmamba_ref.__file__).parent / "data" / "coffee.png"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with two photographs, one of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    with Image.open(PHOTOGRAPH) as image:
        image.crop((0, 0, 300, 400)).save(folder / "left.png")
        image.crop((300, 0, 600, 400)).save(folder / "more" / "right.png")
    return folder


def arguments(photographs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--data", str(photographs), "--out", str(out), "--batch", "2", "--crop", "64"),
        *("--validation", "1", "--warmup", "2", *more),
    ]


def test_training_exports_a_model_that_codes(photographs, tmp_path):
    assert train.main(arguments(photographs, tmp_path / "run", "--steps", "3")) == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["event"] == "start"
    assert records[-1]["event"] == "end" and records[-1]["step"] == 3
    assert set(records[-1]["qualities"]) == {"1.0", "3.0", "5.0", "8.0"}
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))

    model = cmamba_ref.CMamba.from_pretrained(tmp_path / "run" / "model")
    picture = np.asarray(Image.open(PHOTOGRAPH))[:70, :90]
    decoded = cmamba_ref.decode(cmamba_ref.encode(model, picture, 5), model)
    assert decoded.shape == picture.shape


def test_loss_falls(photographs, tmp_path):
    args = train.parse_args(arguments(photographs, tmp_path, "--steps", "30", "--lr", "5e-4"))
    trainer = train.Trainer(args)
    photos = train.load_photographs(photographs)
    losses = [trainer.train_step(photos)["loss"] for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert trainer.skipped == 0


def test_resumed_training_is_the_same_training(photographs, tmp_path):
    """Three steps, a checkpoint and three steps give the losses of six steps."""
    args = train.parse_args(arguments(photographs, tmp_path, "--steps", "6"))
    photos = train.load_photographs(photographs)
    whole = train.Trainer(args)
    expected = [whole.train_step(photos) for _ in range(6)]

    first = train.Trainer(args)
    losses = [first.train_step(photos) for _ in range(3)]
    first.save()
    second = train.Trainer(args)
    second.resume(tmp_path / "checkpoint.pt")
    losses += [second.train_step(photos) for _ in range(3)]
    assert losses == expected
    assert second.step == 6


def test_checkpoint_of_another_configuration_is_refused(photographs, tmp_path):
    args = train.parse_args(arguments(photographs, tmp_path, "--steps", "6"))
    train.Trainer(args).save()
    args.config = "small"
    with pytest.raises(SystemExit, match="another configuration"):
        train.Trainer(args).resume(tmp_path / "checkpoint.pt")


def test_nan_gradients_are_skipped_and_counted(photographs, tmp_path, monkeypatch):
    args = train.parse_args(arguments(photographs, tmp_path, "--steps", "6"))
    trainer = train.Trainer(args)
    photos = train.load_photographs(photographs)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    loss_of = train.rate_distortion_loss

    def broken(*args):
        return {name: value * torch.nan for name, value in loss_of(*args).items()}

    monkeypatch.setattr(train, "rate_distortion_loss", broken)
    trainer.train_step(photos)
    assert trainer.skipped == 1
    for name, parameter in trainer.model.named_parameters():
        if (
            name != "entropy_bottleneck.quantiles"
        ):  # these have a loss and an optimiser of their own
            assert torch.equal(parameter, before[name]), name


def test_learning_rate_rises_stays_and_falls(photographs, tmp_path):
    args = train.parse_args(
        arguments(photographs, tmp_path, "--steps", "100", "--lr", "1e-3", "--final-lr", "1e-5")
    )
    args.warmup, args.decay = 10, 0.5
    rates = [args.lr * train.lr_factor(step, step / 100, args) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[50] == pytest.approx(1e-3)
    assert rates[75] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[100] == pytest.approx(1e-5)


def test_crops_come_from_the_photograph_at_several_scales(photographs):
    photo = train.load_photographs(photographs)[0]
    rng = np.random.default_rng(0)
    crops = [train.random_crop(photo, 128, rng) for _ in range(20)]
    assert {crop.shape for crop in crops} == {(128, 128, 3)}
    assert len({crop.tobytes() for crop in crops}) == 20
    whole = photo.reshape(-1, 3).mean(0)
    assert np.abs(np.mean([crop.reshape(-1, 3).mean(0) for crop in crops], 0) - whole).max() < 25


def test_a_folder_without_photographs_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty"):
        train.main(arguments(tmp_path / "empty", tmp_path / "run", "--steps", "1"))


@pytest.mark.parametrize(
    "more",
    [["--steps", "0"], ["--steps", "1", "--validation", "0"], ["--steps", "1", "--crop", "70"]],
)
def test_impossible_arguments_are_refused(photographs, tmp_path, more, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(photographs, tmp_path / "run", *more))
    assert "must be" in capsys.readouterr().err


def test_too_few_photographs_are_refused(photographs, tmp_path):
    args = arguments(photographs, tmp_path / "run", "--steps", "1", "--validation", "2")
    with pytest.raises(SystemExit, match="nothing is left"):
        train.main(args)


def test_training_starts_from_given_weights(photographs, tmp_path):
    args = arguments(photographs, tmp_path / "run", "--steps", "1", "--round-transforms")
    assert train.main(args) == 0
    model = tmp_path / "run" / "model"
    assert (model / "model.safetensors").stat().st_size < 16e6
    args = train.parse_args(arguments(photographs, tmp_path, "--steps", "1", "--init", str(model)))
    started = train.Trainer(args).model.state_dict()
    for name, tensor in cmamba_ref.CMamba.from_pretrained(model).state_dict().items():
        assert torch.equal(started[name], tensor), name
    with pytest.raises(SystemExit, match="--init"):
        train.main(
            arguments(photographs, tmp_path, "--steps", "1", "--init", str(tmp_path / "none"))
        )


def test_a_photograph_smaller_than_the_crop_is_refused():
    with pytest.raises(SystemExit, match="smaller"):
        train.random_crop(np.zeros((40, 90, 3), np.uint8), 64, np.random.default_rng(0))
