"""The command `tools/train.py`: it learns, never loses work, and exports a model that codes."""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cmamba_ref
from cmamba_ref import InvalidArgumentError
from cmamba_ref.training import (
    checkpoints,
    data,
    distributed,
    exporter,
    trainer,
    validation,
)
from cmamba_ref.training.distributed import Group
from cmamba_ref.training.settings import resolve
from tests.codec_helpers import ONE_RATE, SMALL, load_image
from tests.training_helpers import (
    arguments,
    losses,
    make_run_folder,
    make_trainer,
    records,
    write_config,
)
from tools import train

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path)


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a training in a process of its own, which ends with the test at the latest."""
    started = []
    path = os.pathsep.join([str(root), str(root / "tools")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def popen(folder: Path, launcher: Sequence[str] = (), script: Path | None = None, **changes):
        launch = [sys.executable, *launcher, str(script or root / "tools" / "train.py")]
        command = [*launch, *arguments(folder, **changes)]
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def assert_succeeds(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait until something has happened or the process has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if happened():
                return
        time.sleep(0.01)


def events(out: Path, event: str) -> list[dict]:
    """The records of one kind in the log of a run."""
    return [record for record in records(out) if record.get("event") == event]


def saved_state(out: Path) -> dict:
    saved = checkpoints.newest(out / "checkpoints")
    assert saved is not None
    return saved.state


# ---------------------------------------------------------------- the results of a run


def test_training_exports_a_model_that_codes(folder):
    changes = {"samples": 1, "coded": "end", "validate_every": 2, "round_weights": True}
    assert train.main(arguments(folder, steps=3, **changes)) == 0
    out = folder / "run"
    log = records(out)
    assert sum(log[1]["share"].values()) == pytest.approx(1, abs=1e-3)
    assert set(log[1]["share"]) == {"data", "forward", "backward", "optimiser"}
    assert log[1]["images_per_second"] > 0
    assert log[0]["event"] == "start" and log[0]["settings"]["steps"] == 3
    assert log[0]["model"]["latent_channels"] == SMALL.latent_channels
    assert [record["step"] for record in events(out, "validation")] == [2]
    end = log[-1]
    assert end["event"] == "end" and end["step"] == 3
    assert set(end["qualities"]) == {"1.0", "3.0", "5.0", "8.0"}
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ".sha256", ".png"}  # no pickle

    stored = load_file(out / "model" / "model.safetensors")
    model = cmamba_ref.CMamba.from_pretrained(out / "model")
    assert {stored[name].dtype for name, _ in model.named_parameters()} == {torch.float16}

    # The rate is that of files, and the sample is what a decoder makes of one.
    original = load_image(out / "samples" / "000000003" / "0-original.png")
    data = cmamba_ref.encode(original, model, 8)
    assert end["qualities"]["8.0"]["file_bpp"] == 8 * len(data) / 64**2
    sample = load_image(out / "samples" / "000000003" / "0-quality-8.png")
    assert np.array_equal(sample, cmamba_ref.decode(data, model))


@pytest.mark.parametrize("part", [1.0, 0.75])
def test_a_model_of_one_rate_trains_for_ms_ssim(folder, part):
    write_config(folder / "config.json", ONE_RATE)
    changes = {"steps": 1, "crop": [192], "ms_ssim": part, "lmbda": 0.02}
    assert train.main(arguments(folder, validation_crop=192, optimiser="adamw", **changes)) == 0
    assert cmamba_ref.CMamba.from_pretrained(folder / "run" / "model").config.metric == "ms-ssim"
    _, step, end = records(folder / "run")
    assert step["loss"] == pytest.approx(step["bpp"] + 0.02 * 255**2 * step["distortion"], rel=1e-5)
    measured = end["qualities"]["None"]
    assert measured["ms_ssim"] > 0.5
    mse = 10 ** (-measured["psnr"] / 10)
    distortion = part * 1280 * (1 - measured["ms_ssim"]) + (1 - part) * 255**2 * mse
    assert measured["loss"] == pytest.approx(measured["bpp"] + 0.02 * distortion, rel=1e-4)


def test_profile_finds_all_parts(folder):
    assert train.main(arguments(folder, steps=5, profile=1)) == 0
    (record,) = events(folder / "run", "profile")
    parts = record["share_of_operators"]
    assert set(parts) == {"entropy model", "scan", "convolution", "rest"}
    assert min(parts.values()) > 0.02
    assert sum(parts.values()) == pytest.approx(1, abs=1e-3)


def test_tensorboard_is_optional(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match=r"\.\[train\]"):
        train.main(arguments(folder, tensorboard=True))

    writer = mock.Mock()
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train.main(arguments(folder, steps=1, tensorboard=True)) == 0
    writer.assert_called_once_with(str(folder / "run" / "tensorboard"), purge_step=1)
    scalars = [call.args for call in writer().add_scalar.call_args_list]
    written = {(name, step) for name, _, step in scalars}
    assert {("loss", 1), ("share/data", 1), ("qualities/8.0/psnr", 1)} <= written
    writer().close.assert_called_once()


# ---------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "soap"])
def test_killed_training_goes_on_as_if_it_had_not_been(folder, start, optimiser):
    """SIGKILL at a random moment, resumed: the losses and weights of an uninterrupted run."""
    changes = {"steps": 18, "save_every": 0.0, "keep": 2, "log_every": 1, "optimiser": optimiser}
    assert train.main(arguments(folder, **changes, out=folder / "whole")) == 0

    process = start(folder, **changes, out=folder / "killed")
    log = folder / "killed" / "log.jsonl"
    wait_for(process, lambda: '"step": 3,' in log.read_text())
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert '"step": 18,' not in log.read_text()

    assert train.main(arguments(folder, **changes, out=folder / "killed")) == 0
    assert losses(folder / "killed") == losses(folder / "whole")
    assert len(losses(folder / "whole")) == 18
    assert_same_weights(folder / "killed", folder / "whole")


def assert_same_weights(one: Path, other: Path) -> None:
    weights = [load_file(out / "model" / "model.safetensors") for out in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(folder, monkeypatch, number):
    step = trainer.Trainer.train_step

    def interrupted(self, **options):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, **options)

    before = signal.getsignal(number)
    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    assert train.main(arguments(folder, log_every=5)) == 128 + number
    assert signal.getsignal(number) is before
    out = folder / "run"
    assert 3 <= saved_state(out)["step"] < 6
    assert not (out / "model").exists()

    # A window of the log that was open is closed by the run that goes on.
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert train.main(arguments(folder, log_every=5)) == 0
    assert train.main(arguments(folder, log_every=5, out=folder / "whole")) == 0
    assert losses(out) == losses(folder / "whole")
    assert_same_weights(out, folder / "whole")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "cut" else data)


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(folder, how, caplog):
    changes = {"steps": 4, "save_every": 0.0}
    assert train.main(arguments(folder, **changes, out=folder / "whole")) == 0
    assert train.main(arguments(folder, **changes)) == 0
    out = folder / "run"
    *_, before, last = sorted((out / "checkpoints").iterdir())
    damage(last, how)
    caplog.set_level(logging.WARNING)
    assert train.main(arguments(folder, **changes)) == 0
    assert f"{last} is damaged" in caplog.text and "the one before" in caplog.text
    assert [record["step"] for record in events(out, "resume")] == [3]
    assert losses(out) == losses(folder / "whole")
    assert_same_weights(out, folder / "whole")

    for path in (out / "checkpoints").iterdir():
        damage(path, how)
    with pytest.raises(SystemExit, match=r"damaged ones .* start anew"):
        train.main(arguments(folder, **changes))


def test_the_newest_and_the_best_are_kept(folder, monkeypatch):
    # Of the held-out crops, each followed by that of crops that are trained on.
    scores = iter([3.0, 9.0, 1.0, 9.0, 2.0, 0.5, 5.0, 0.5, 4.0, 9.0])
    monkeypatch.setattr(train.validation, "mean_loss", lambda _: next(scores))
    changes = {"steps": 10, "validate_every": 2, "keep": 2, "save_every": 0.0}
    assert train.main(arguments(folder, **changes)) == 0
    out = folder / "run"
    steps = sorted(int(path.name.split("-")[1]) for path in (out / "checkpoints").iterdir())
    assert steps == [4, 9, 10]
    assert saved_state(out)["best"] == {"step": 4, "loss": 1.0}
    best = load_file(out / "best" / "model.safetensors")
    name = "g_a.0.weight" if "g_a.0.weight" in best else next(n for n in best if "weight" in n)
    (of_step_4,) = (out / "checkpoints").glob("checkpoint-000000004-*")
    assert torch.equal(best[name].float(), checkpoints.read(of_step_4).tensors[f"average.{name}"])


# ---------------------------------------------------------------- going on


def test_going_on_with_other_settings_or_images_is_refused(folder):
    assert train.main(arguments(folder, steps=2)) == 0
    log = (folder / "run" / "log.jsonl").read_bytes()
    for changes, message in (
        ({"lr": 5e-4}, r"lr was 0.0001 and is now 0.0005"),
        ({"batch": [4]}, r"batch was \[2\] and is now \[4\]"),
        ({"steps": 3}, r"steps was 2 and is now 3, unless you say --extend"),
        ({"steps": 1}, r"steps was 2 and is now 1[.]"),
        ({"steps": None, "minutes": 1.0}, r"minutes was 0.0 and is now 1.0"),
        ({"model": ["d_state=3"]}, r"the model's configuration is another"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(arguments(folder, **{"steps": 2, **changes}))
    (folder / "photos" / "4.png").unlink()
    with pytest.raises(SystemExit, match="images are not the ones"):
        train.main(arguments(folder, steps=2))
    assert (folder / "run" / "log.jsonl").read_bytes() == log


def test_a_run_can_be_made_longer(folder):
    """With a constant rate, a run in two parts is the run in one."""
    constant = {"decay": 0.0, "save_every": 60.0}
    assert train.main(arguments(folder, steps=2, **constant)) == 0
    # What says how or where, and not what is learned, may change.
    moved = {"data": (folder / "photos").rename(folder / "moved"), "workers": 1, "keep": 1}
    assert train.main([*arguments(folder, steps=5, **constant, **moved), "--extend"]) == 0
    whole = {**constant, **moved, "out": folder / "whole"}
    assert train.main(arguments(folder, steps=5, **whole)) == 0
    assert losses(folder / "run") == losses(folder / "whole")
    assert_same_weights(folder / "run", folder / "whole")


def test_a_run_of_minutes_ends_and_counts_only_training(folder, monkeypatch):
    validate = train.validation.validate

    def slow(*args, **options):
        time.sleep(0.4)
        return validate(*args, **options)

    monkeypatch.setattr(train.validation, "validate", slow)
    changes = {"steps": None, "minutes": 0.05, "validate_every": 2}
    began = time.monotonic()
    assert train.main(arguments(folder, **changes)) == 0
    spent = time.monotonic() - began
    log = records(folder / "run")
    validations = sum("qualities" in record for record in log)
    end = log[-1]
    assert end["event"] == "end" and end["step"] > 1 and validations > 1
    # Each looks at the held-out crops, and at as many of those that are trained on.
    assert 3 <= 60 * end["minutes"] < spent - 2 * 0.4 * validations
    gap = end["mean_loss"]["held_out"] - end["mean_loss"]["trained_on"]
    assert end["mean_loss"]["gap"] == pytest.approx(gap) and gap != 0


def test_a_run_of_core_hours_counts_processor_time(folder):
    changes = {"steps": None, "core_hours": 1.0 / 3600, "validate_every": 0}
    assert train.main(arguments(folder, **changes)) == 0
    end = records(folder / "run")[-1]
    assert end["event"] == "end" and end["step"] > 1
    assert 1 <= 3600 * end["core_hours"] < 4
    assert end["megapixels"] == pytest.approx(2 * 64**2 * end["step"] / 1e6, abs=1e-3)


def test_training_starts_from_given_weights(folder):
    assert train.main(arguments(folder, steps=2)) == 0
    given = cmamba_ref.CMamba.from_pretrained(folder / "run" / "model").state_dict()
    changes = {"config": None, "init": folder / "run" / "model", "out": folder / "more"}
    # So small a rate changes no weight, so what comes out is what went in.
    still = {"lr": 1e-12, "final_lr": 0.0, "aux_lr": 0.0, "steps": 1}
    assert train.main(arguments(folder, **changes, **still)) == 0
    start = records(folder / "more")[0]
    assert start["event"] == "start" and start["step"] == 0
    for name, tensor in load_file(folder / "more" / "model" / "model.safetensors").items():
        if "stored" not in name:
            assert torch.allclose(tensor.float(), given[name], atol=1e-9), name
    with pytest.raises(SystemExit, match="no config.json"):
        train.main(arguments(folder, **{**changes, "init": folder / "none"}))


def test_tables_are_fitted_to_the_symbols_of_training_images(folder):
    """The same weights, with tables that code these images in fewer bytes."""
    still = {"steps": 1, "lr": 1e-12, "final_lr": 0.0, "aux_lr": 0.0, "warmup": 0}
    for name, count in (("gaussian", 0), ("fitted", 4)):
        assert train.main(arguments(folder, out=folder / name, fit_tables=count, **still)) == 0
    models = {
        name: cmamba_ref.CMamba.from_pretrained(folder / name / "model")
        for name in ("gaussian", "fitted")
    }
    image = data.read_rgb(folder / "photos" / "0.png")
    files = {name: cmamba_ref.encode(image, model, 8) for name, model in models.items()}
    assert len(files["fitted"]) < len(files["gaussian"])
    decoded = [cmamba_ref.decode(files[name], model) for name, model in models.items()]
    assert np.array_equal(*decoded)


# ---------------------------------------------------------------- results that are carried away


def exported_files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("keep", [8, 4, 3])
def test_at_most_so_many_files_are_exported_and_the_current_model_is_among_them(folder, keep):
    out = folder / "carried"
    changes = {"export": out, "export_every": 0.0, "export_keep": keep, "validate_every": 1}
    assert train.main(arguments(folder, steps=2, **changes)) == 0
    names = [
        *("model/config.json", "model/model.safetensors", "model/run.json", "log.jsonl"),
        *("best/config.json", "best/model.safetensors", "best/run.json"),
    ]
    assert exported_files(out) == sorted(names[:keep])
    for name in ("model", "best")[: 1 + (keep == 8)]:
        model = cmamba_ref.CMamba.from_pretrained(out / name)
        record = json.loads((out / name / "run.json").read_text())
        assert record["model_id"] == model.model_id.hex() and record["step"] in (1, 2)
        stored = load_file(out / name / "model.safetensors")
        assert {stored[n].dtype for n, _ in model.named_parameters()} == {torch.float16}
    assert json.loads((out / "model" / "run.json").read_text())["step"] == 2
    if keep > 3:
        assert (out / "log.jsonl").read_text() == (folder / "run" / "log.jsonl").read_text()


def test_the_export_of_a_killed_run_goes_on(folder, start):
    """Of a run that is killed without a checkpoint, seconds are lost."""
    out = folder / "carried"
    record = out / "model" / "run.json"
    changes = {"steps": 10_000, "validate_every": 0, "save_every": 600.0}
    running = start(folder, export=out, export_every=0.2, **changes)
    wait_for(running, lambda: json.loads(record.read_text())["step"] >= 2)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not list((folder / "run").glob("checkpoints/*"))
    step = json.loads(record.read_text())["step"]
    more = {"config": None, "init": out / "model", "continue_from": record}
    now = {"out": folder / "more", "steps": step + 1}
    assert train.main(arguments(folder, **{**changes, **more, **now})) == 0
    assert records(folder / "more")[0]["step"] == step


def test_a_model_too_large_to_export_is_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(exporter, "MAX_BYTES", 10_000)
    with pytest.raises(SystemExit, match="at most 0.01 MB for `export`, these take"):
        train.main(arguments(folder, steps=2, export=folder / "carried"))
    assert not [r for r in records(folder / "run") if r["step"] > 0]


def test_of_a_long_log_the_end_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "MAX_BYTES", 50)
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(20)))
    exporter.Exporter(tmp_path / "out", 1.0, 8).write_log(tmp_path / "log.jsonl")
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [17, 18, 19]


def test_ms_ssim_is_measured_where_the_model_is(monkeypatch):
    """On a CPU it took most of the time of a validation on a GPU."""
    devices = []
    monkeypatch.setattr(validation, "ms_ssim", lambda a, b, device: devices.append(device) or 1.0)
    model = cmamba_ref.CMamba(SMALL).eval()
    model.update()
    crop = np.zeros((192, 192, 3), dtype=np.uint8)
    run = resolve({}, {"config": "tiny", "steps": 1, "validation_crop": 192})
    validation.validate(model, [crop], run, Group(torch.device("cpu")))
    assert devices == [torch.device("cpu")] * len(validation.qualities_of(model))


def test_validation_does_without_ms_ssim_where_it_is_not_installed(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pytorch_msssim", None)
    validation.can_measure_ms_ssim.cache_clear()
    caplog.set_level(logging.WARNING)
    try:
        assert train.main(arguments(folder, steps=1, validation_crop=192)) == 0
    finally:
        validation.can_measure_ms_ssim.cache_clear()
    qualities = records(folder / "run")[-1]["qualities"].values()
    assert all("psnr" in measures and "ms_ssim" not in measures for measures in qualities)
    assert caplog.text.count("MS-SSIM: pytorch-msssim is not installed") == 1


# ---------------------------------------------------------------- several processes


def test_two_processes_train_as_one(folder, start):
    """The same command under torchrun: the same batches, noise and qualities, the same training.

    Sums are taken in another order, so losses agree to rounding; Adam divides a gradient by its
    size, also one that is nothing but rounding, so weights agree to a part of a step.
    """
    changes = {"steps": 3, "batch": [4], "lr": 1e-3, "validation": 2, "coded": "end"}
    assert train.main(arguments(folder, **changes, out=folder / "one")) == 0
    assert_succeeds(start(folder, TORCHRUN, **changes, out=folder / "two"))
    one, two = losses(folder / "one"), losses(folder / "two")
    assert one.keys() == two.keys() == {1, 2, 3}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5), step

    weights = [load_file(folder / out / "model" / "model.safetensors") for out in ("one", "two")]
    moved = {n: (weights[0][n].float() - weights[1][n].float()).abs() for n in weights[0]}
    values = torch.cat([moved[n].flatten() for n in moved if "stored" not in n])
    assert values.max() < 1e-4  # of three steps of up to 1e-3
    assert values.mean() < 1e-7
    ends = [records(folder / out)[-1]["qualities"] for out in ("one", "two")]
    for quality, measures in ends[0].items():
        assert ends[1][quality] == pytest.approx(measures, rel=1e-3)


def test_two_processes_divide_soap(folder, start):
    """Started by the command itself: the losses of one process, within 1e-3."""
    changes = {"steps": 24, "batch": [4], "lr": 1e-3, "warmup": 100, "optimiser": "soap"}
    assert train.main(arguments(folder, **changes, out=folder / "one")) == 0
    assert_succeeds(start(folder, **changes, out=folder / "two", processes=2))
    one, two = losses(folder / "one"), losses(folder / "two")
    assert one.keys() == two.keys() and len(one) == 24
    for step in one:
        assert two[step][0] == pytest.approx(one[step][0], rel=1e-3), step
    for step in range(1, 13):  # with the norm of the gradient
        assert two[step] == pytest.approx(one[step], rel=1e-3), step
    # The state of the optimiser lay with both, and is in one checkpoint.
    saved = [checkpoints.newest(folder / out / "checkpoints") for out in ("one", "two")]
    assert saved[0] is not None and saved[1] is not None
    assert saved[0].tensors.keys() == saved[1].tensors.keys()
    # So one process can go on with it.
    more = {**changes, "steps": 26, "out": folder / "two"}
    assert train.main([*arguments(folder, **more), "--extend"]) == 0
    assert records(folder / "two")[-1]["step"] == 26


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(folder, start):
    script = folder / "broken.py"
    script.write_text(
        "import os, sys\n"
        "from cmamba_ref.training import trainer\n"
        "from tools import train\n"
        "objective, calls = trainer.objective, []\n"
        "def broken(*args):\n"
        "    calls.append(None)\n"
        "    nan = len(calls) == 2 and os.environ['RANK'] == '1'\n"
        "    return {n: v * float('nan') if nan else v for n, v in objective(*args).items()}\n"
        "trainer.objective = broken\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    assert_succeeds(start(folder, TORCHRUN, script, steps=4, batch=[2], optimiser="soap"))
    steps = [record for record in records(folder / "run") if "event" not in record]
    assert [record["skipped"] for record in steps] == [0, 1, 1, 1]
    assert ["loss" in record for record in steps] == [True, False, True, True]


def test_a_process_that_dies_ends_the_others(folder, start):
    """Nobody waits for ever, and the checkpoint that was there is good."""
    process = start(folder, steps=10_000, batch=[4], save_every=0.0, processes=2)
    log = folder / "run" / "log.jsonl"
    wait_for(process, lambda: '"step": 2,' in log.read_text())
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert saved_state(folder / "run")["step"] >= 1


def test_an_error_of_the_first_process_ends_all(folder, start):
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").write_text("no folder")
    process = start(folder, batch=[4], processes=2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "checkpoints" in errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 3, "batch": [4]}, "`processes` x `accumulate` = 3"),
        ({"processes": 2, "batch": [2], "accumulate": 2}, "`processes` x `accumulate` = 4"),
    ],
)
def test_impossible_numbers_of_processes_are_refused_at_once(folder, changes, message):
    with pytest.raises(SystemExit, match=message):
        train.main(arguments(folder, **changes))


def test_processes_are_as_many_as_cores_and_batches_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert distributed.processes_for("cpu", (12,), 1) == 6
    assert distributed.processes_for("cpu", (8,), 1) == 4
    assert distributed.processes_for("cpu", (12, 8), 1) == 4
    assert distributed.processes_for("cpu", (8,), 4) == 2
    assert distributed.processes_for("cpu", (3,), 2) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.processes_for("auto", (8,), 1) == 1
    with pytest.raises(InvalidArgumentError, match="torchrun"):
        distributed.processes_for("cuda", (8,), 1, 2)


# ---------------------------------------------------------------- from exported weights


def test_exported_weights_and_their_record_are_enough_to_go_on(folder):
    """Without the optimiser's state: the schedule, the data and about the loss of the whole run."""
    changes = {"batch": [4], "lr": 2e-4, "optimiser": "soap", "ema": 0.9, "decay": 0.0}
    part, whole = folder / "part", folder / "whole"
    assert train.main(arguments(folder, **changes, steps=16, out=part)) == 0
    assert train.main(arguments(folder, **changes, steps=24, out=whole)) == 0
    weights = part / "model"
    run = {"init": weights, "continue_from": weights / "run.json", "config": None}
    assert train.main(arguments(folder, **changes, **run, steps=24, out=folder / "more")) == 0

    record = json.loads((weights / "run.json").read_text())
    assert (record["step"], record["samples"], record["pixels"]) == (16, 64, 64 * 64**2)
    assert record["core_hours"] > 0 and record["lr"] == 2e-4
    assert record["phase"] == {"crop": 64, "batch": 4}
    start = records(folder / "more")[0]
    assert start["event"] == "start" and start["step"] == 16
    assert start["core_hours"] == pytest.approx(record["core_hours"], abs=1e-4)
    found, expected = losses(folder / "more"), losses(whole)
    assert list(found) == list(range(17, 25))
    # The first batch meets the averaged weights in place of the last ones.
    assert found[17][0] == pytest.approx(expected[17][0], rel=0.05)
    means = [np.mean([run[step][0] for step in found]) for run in (found, expected)]
    assert means[0] == pytest.approx(means[1], rel=0.1)


@pytest.mark.parametrize("optimiser", ["adam", "soap"])
def test_statistics_are_gathered_before_the_first_step(folder, monkeypatch, optimiser):
    """Of the batches before that point, in the phase that begins there; no weight changes."""
    phases = {"crop": [64, 128], "batch": [4, 2], "until": [0.5]}
    changes = {"steps": 18, **phases, "optimiser": optimiser, "ema": 0.0}
    first = make_trainer(folder, **changes)
    for _ in range(9):
        first.train_step()
    first.is_best(3.0)
    exported = first.finished_model()
    exported.save_pretrained(folder / "saved")
    record = json.loads(json.dumps(first.record(exported)))
    second = make_trainer(folder, **changes, config="", init=str(folder / "saved"))
    before = {name: value.clone() for name, value in second.model.state_dict().items()}
    requests = []
    request = data.Loader.request
    monkeypatch.setattr(
        data.Loader,
        "request",
        lambda self, *where: (requests.append(where), request(self, *where)),
    )
    second.continue_from(record)
    assert (second.step, second.samples, second.pixels) == (9, 36, 36 * 64**2)
    assert second.best == {"step": 9, "loss": 3.0}
    assert [(step, sample) for step, sample, _ in requests] == [(n, 18 + 2 * n) for n in range(9)]
    assert {tuple(phase) for *_, phase in requests} == {(128, 2)}
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    states = [second.optimiser.state[parameter] for parameter in second.parameters]
    assert {int(state["round" if optimiser == "soap" else "step"]) for state in states} == {9}
    second.train_step()
    assert requests[9] == (9, 36, (128, 2))
    # What was gathered counts neither as time nor as a part of the log.
    assert second.seconds == pytest.approx(first.seconds + second.clock.total)
    assert float(second.window.steps) == 1
    first.close()
    second.close()


def test_invalid_records_are_refused(folder):
    assert train.main(arguments(folder, steps=1)) == 0
    weights, path = folder / "run" / "model", folder / "record.json"
    run = {"init": weights, "continue_from": path, "config": None, "out": folder / "more"}
    incomplete = json.loads((weights / "run.json").read_text())
    del incomplete["pixels"]
    for content, message in (
        (None, "cannot read"),
        ([1], "a JSON object"),
        ({}, "format 1"),
        ({"format": 1, "step": 3}, "must belong to the weights"),
        (incomplete, "a record of a run: KeyError"),
    ):
        if content is not None:
            path.write_text(json.dumps(content))
        with pytest.raises(SystemExit, match=message):
            train.main(arguments(folder, **run))


# ---------------------------------------------------------------- usage


def test_a_damaged_image_to_train_on_stops_nothing(folder):
    path = data.find_images(folder / "photos", 64, held_out=1).train[0]
    path.write_bytes(path.read_bytes()[:2000])
    assert train.main(arguments(folder, steps=2)) == 0
    assert np.isfinite(records(folder / "run")[-1]["mean_loss"]["trained_on"])


def test_a_folder_with_too_few_images_is_refused(folder):
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit, match="got 0 below .*empty"):
        train.main(arguments(folder, data=folder / "empty"))
    message = (
        r"at least 7 images of 64 pixels .* 6 to hold out \(--validation\).* lower --validation"
    )
    with pytest.raises(SystemExit, match=message):
        train.main(arguments(folder, validation=6))
    for path in (folder / "nowhere", next((folder / "photos").glob("*.png"))):
        with pytest.raises(SystemExit, match="must be a folder of images, .* no such folder"):
            train.main(arguments(folder, data=path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "must be above 0"),
        ({"validation": 0}, "must be at least 1"),
        ({"crop": [70]}, "multiple of 64"),
        ({"out": None}, "--out"),
        ({"precision": "fp8"}, "fp8"),
        ({"model": ["d_state"]}, "KEY=VALUE"),
    ],
)
def test_impossible_arguments_are_refused(folder, changes, message, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(arguments(folder, **changes))
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_counts_more_than_the_file(folder):
    recipe = folder / "recipe.toml"
    recipe.write_text('steps = 100\nlr = 3e-4\ndata = "photos"\n[model]\nd_state = 3\nslices = 4\n')
    line = "--minutes 2 --out runs --model d_state=4 depths=[0,1,1] --model d_state=5"
    resolved, extend = train.parse_args([str(recipe), *line.split()])
    assert not extend
    assert (resolved.steps, resolved.minutes, resolved.lr) == (0, 2.0, 3e-4)
    assert resolved.data == "photos"
    config = resolved.model_config()
    assert (config.d_state, config.slices, config.depths) == (5, 4, (0, 1, 1))


# ---------------------------------------------------------------- slow


# torch's own, when it traces an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_model_trains_as_the_model(folder):
    changes = {"steps": 3, "decay": 0.0}
    assert train.main(arguments(folder, **changes, out=folder / "eager")) == 0
    assert train.main(arguments(folder, **changes, out=folder / "compiled", compile=True)) == 0
    eager, compiled = losses(folder / "eager"), losses(folder / "compiled")
    for step in eager:
        assert compiled[step] == pytest.approx(eager[step], rel=1e-3)
