"""The parts of the trainer: settings, schedule, draws, data, checkpoints, one step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmamba_ref import CMamba, InvalidArgumentError
from cmamba_ref.errors import TrainingError
from cmamba_ref.training import checkpoints, data, draws, settings, trainer
from cmamba_ref.training.checkpoints import Checkpoint
from cmamba_ref.training.log import Log
from cmamba_ref.training.schedule import Phase, learning_rate
from cmamba_ref.training.trainer import Trainer
from tests import training_helpers
from tests.codec_helpers import SMALL
from tests.training_helpers import make_run_folder, make_trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run_folder(tmp_path)


def numbers(record: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items()}


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


# ---------------------------------------------------------------- settings and schedule


def test_recipes_are_whole(root):
    recipes = sorted((root / "tools" / "recipes").glob("*.toml"))
    assert len(recipes) >= 3
    for path in recipes:
        resolved = settings.resolve(settings.read_toml(path), {"data": "photos", "out": "run"})
        config = resolved.model_config()
        assert resolved.to_dict() == json.loads(json.dumps(resolved.to_dict()))
        # Those of 1 - MS-SSIM alone are larger, and of no use with the loss of this version.
        assert 0 < max(config.lmbdas or (resolved.lmbda,)) < 0.5, path
        assert config.variable_rate or "all qualities in one model" not in path.read_text(), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "`lr` must be from"),
        ({"lr": float("nan")}, "`lr` must be from"),
        ({"lr": "fast"}, "`lr` must be of type float"),
        ({"steps": True}, "`steps` must be of type int"),
        ({"batch": [8, 4]}, "as many entries as `batch`"),
        ({"crop": [64, 128], "batch": [8, 4], "until": [1.5]}, "`until` must be from"),
        (
            {"crop": [64] * 3, "batch": [1] * 3, "until": [0.6, 0.5]},
            "`until` must rise",
        ),
        ({"milestones": [0.9, 0.8]}, "`milestones` must rise"),
        ({"validation_crop": 100}, "multiple of 64"),
        ({"ms_ssim": 0.5, "crop": [128]}, "at least 161"),
        ({"ms_ssim": 0.5, "crop": [192], "cuda_graph": True}, "`cuda_graph` must be off"),
        ({"ms_ssim": 1.5}, "`ms_ssim` must be from"),
        ({"optimiser": "sgd"}, "one of adam, adamw, soap"),
        ({"profile": 1, "compile": True}, "`profile` must be 0"),
        ({"profile": 1, "cuda_graph": True}, "`profile` must be 0"),
        ({"init": "weights", "model": {"d_state": 4}}, "`init` must stand without"),
        ({"model": 3}, "`model` must be a table"),
    ],
)
def test_impossible_settings_are_refused(folder, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        training_helpers.settings(folder, **changes)


@pytest.mark.parametrize(
    ("text", "message"), [("lr = ", "cannot read"), ("rate = 3", r"\['rate'\]")]
)
def test_files_that_hold_no_settings_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        settings.read_toml(tmp_path / "recipe.toml")
    with pytest.raises(InvalidArgumentError, match="absent"):
        settings.read_toml(tmp_path / "absent.toml")


def test_weights_from_the_command_line_leave_the_record_of_others(folder):
    file = {"steps": 5, "init": "a", "continue_from": "a/run.json"}
    assert settings.resolve(file, {}).continue_from == "a/run.json"
    assert settings.resolve(file, {"init": "b"}).continue_from == ""
    assert settings.resolve(file, {"config": "tiny"}).continue_from == ""
    with pytest.raises(InvalidArgumentError, match="`continue_from` must stand with `init`"):
        settings.resolve({"steps": 5}, {"continue_from": "a/run.json"})


def test_unknown_models_are_refused(folder):
    for changes in ({"config": "huge"}, {"model": {"colour": 1}}, {"model": {"d_state": 0}}):
        with pytest.raises(InvalidArgumentError, match="config|colour|d_state"):
            training_helpers.settings(folder, **changes).model_config()


def test_a_setting_newer_than_a_run_was_at_its_default(folder):
    now = training_helpers.settings(folder)
    saved = now.to_dict()
    del saved["log_loss"]
    assert settings.conflicts(saved, now, extend=False) == []
    changed = training_helpers.settings(folder, log_loss=True)
    expected = ["log_loss was False and is now True"]
    assert settings.conflicts(saved, changed, extend=False) == expected
    del saved["milestones"]  # of several numbers
    assert settings.conflicts(saved, now, extend=False) == []


def test_a_setting_that_is_gone_is_told_where_it_did_something(folder):
    now = training_helpers.settings(folder)
    assert settings.conflicts({**now.to_dict(), "distortion": "mse"}, now, extend=False) == []
    (line,) = settings.conflicts({**now.to_dict(), "distortion": "ms-ssim"}, now, extend=False)
    assert line == "distortion was ms-ssim, which is no setting any more"


MIDDLE = (1e-3 + 1e-5) / 2


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", {0: 1e-4, 9: 1e-3, 50: 1e-3, 75: MIDDLE, 99: 2.98e-5, 100: 1e-5}),
        # Flat at both ends, unlike a line.
        ("cosine", {9: 1e-3, 50: 1e-3, 51: 0.999e-3, 75: MIDDLE, 99: 1.0977e-5, 100: 1e-5}),
        ("step", {9: 1e-3, 49: 1e-3, 50: 1e-4, 79: 1e-4, 80: 1e-5, 100: 1e-5}),
    ],
)
def test_learning_rate_rises_stays_and_falls(folder, schedule, rates):
    chosen = {"lr": 1e-3, "final_lr": 1e-5, "warmup": 10, "decay": 0.5, "milestones": [0.5, 0.8]}
    run = training_helpers.settings(folder, schedule=schedule, **chosen)
    found = {step: learning_rate(run, step, step / 100) for step in rates}
    assert found == pytest.approx(rates, rel=2e-3)


def test_a_run_goes_through_its_phases(folder):
    run = make_trainer(folder, crop=[64, 128], batch=[4, 2], until=[0.5])
    seen = []
    take = data.Loader.take

    def watched(loader):
        batch = take(loader)
        seen.append(tuple(batch.x.shape))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Loader, "take", watched)
        for _ in range(6):
            run.train_step()
    assert seen == [(4, 3, 64, 64)] * 3 + [(2, 3, 128, 128)] * 3
    assert run.finished and run.samples == 18
    assert run.report()["crop"] == 128


# ---------------------------------------------------------------- draws and data


def test_each_image_is_visited_before_any_is_again():
    visits = [draws.image(3, sample, 7) for sample in range(21)]
    for visit in range(3):
        of_visit = [number for v, number in visits[7 * visit : 7 * visit + 7] if v == visit]
        assert sorted(of_visit) == list(range(7))
    orders = [[number for _, number in visits[7 * v : 7 * v + 7]] for v in range(3)]
    assert orders[0] != orders[1]
    assert visits != [draws.image(4, sample, 7) for sample in range(21)]
    assert [draws.sample_of(3, *place, 7) for place in visits] == list(range(21))


def test_qualities_are_stratified():
    drawn = draws.qualities(0, step=5, batch=16, top=8)
    assert drawn.dtype == np.float32 and drawn.min() >= 1 and drawn.max() <= 8
    stratum = np.sort((drawn - 1) / 7 * 16).astype(int)
    assert stratum.tolist() == list(range(16))
    assert not np.array_equal(drawn, np.sort(drawn))
    assert not np.array_equal(drawn, draws.qualities(0, step=6, batch=16, top=8))


def test_noise_is_uniform_and_of_the_sample_alone():
    shapes = {"y": (8, 16, 16), "z": (4, 4, 4)}
    noise = draws.noise(0, 11, shapes)
    assert {name: values.shape for name, values in noise.items()} == shapes
    assert -0.5 <= noise["y"].min() < -0.49 and 0.49 < noise["y"].max() < 0.5
    assert noise["y"].var() == pytest.approx(1 / 12, rel=0.1)
    assert np.array_equal(noise["y"], draws.noise(0, 11, shapes)["y"])
    assert not np.array_equal(noise["y"], draws.noise(0, 12, shapes)["y"])


def test_crops_come_from_the_image_at_several_scales(folder):
    photo = data.read_rgb(folder / "photos" / "0.png")
    rng = np.random.default_rng(0)
    crops = [data.random_crop(photo, 96, rng) for _ in range(20)]
    assert {crop.shape for crop in crops} == {(96, 96, 3)}
    assert len({crop.tobytes() for crop in crops}) == 20
    whole = photo.reshape(-1, 3).mean(0)
    assert np.abs(np.mean([crop.reshape(-1, 3).mean(0) for crop in crops], 0) - whole).max() < 25
    # Without reduction a crop is a part of the image, mirrored and turned in all ways.
    parts = np.lib.stride_tricks.sliding_window_view(photo, (192, 192, 3)).reshape(-1, 192, 192, 3)
    orientations = {
        np.rot90(mirrored, turns).tobytes(): (turns, number)
        for part in parts
        for number, mirrored in enumerate((part, part[:, ::-1]))
        for turns in range(4)
    }
    crops = [data.random_crop(photo, 192, rng, scale=1.0) for _ in range(60)]
    assert len({orientations[crop.tobytes()] for crop in crops}) == 8


def test_processes_make_parts_of_one_batch(folder):
    paths = sorted((folder / "photos").rglob("*.png"))
    model = CMamba(SMALL)

    def batch(rank: int, size: int) -> data.Batch:
        cache = data.CropCache(paths, seed=0, scale=2.0, memory=0)
        loader = data.Loader(cache, 0, 8, model.latent_shapes, rank=rank, size=size, workers=1)
        loader.request(3, 40, Phase(64, 4))
        made = loader.take()
        loader.close()
        return made

    whole, parts = batch(0, 1), [batch(0, 2), batch(1, 2)]
    assert whole.quality is not None and parts[0].quality is not None
    assert torch.equal(whole.x, torch.cat([part.x for part in parts]))
    assert torch.equal(whole.quality, torch.cat([part.quality for part in parts]))  # type: ignore[misc]
    for name in ("y", "z"):
        assert torch.equal(whole.noise[name], torch.cat([part.noise[name] for part in parts]))
    assert len({crop.numpy().tobytes() for crop in whole.x}) == 4


# ---------------------------------------------------------------- one step


def test_loss_falls(folder):
    run = make_trainer(folder, steps=40, lr=1e-3, crop=[64], batch=[4])
    losses = [float(run.train_step()["loss"]) for _ in range(40)]
    run.close()
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert run.skipped == 0


def test_parts_of_a_batch_add_up(folder):
    """Four crops at once, or one after the other: the same gradient but for rounding."""
    whole = make_trainer(folder, batch=[4], clip=0.0)
    parts = make_trainer(folder, batch=[4], clip=0.0, accumulate=4)
    records = [numbers(run.train_step()) for run in (whole, parts)]
    assert records[1] == pytest.approx(records[0], rel=1e-4)
    gradients = [{run.names[p]: p.grad for p in run.parameters} for run in (whole, parts)]
    for name, gradient in gradients[0].items():
        # Some gradients are zero but for rounding, hence the second term.
        bound = 1e-4 * gradient.abs().max() + 1e-9 * records[0]["grad_norm"]
        assert (gradients[1][name] - gradient).abs().max() <= bound, name


def test_batches_that_cannot_be_divided_are_refused(folder):
    with pytest.raises(InvalidArgumentError, match="`batch` must be a multiple"):
        make_trainer(folder, batch=[3], accumulate=2)


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "soap"])
def test_steps_that_are_not_finite_are_skipped_and_counted(folder, monkeypatch, optimiser):
    run = make_trainer(folder, optimiser=optimiser)
    run.train_step()
    run.train_step()
    moments = {
        (name, slot): value.clone()
        for parameter, name in run.names.items()
        for slot, value in run.optimiser.state.get(parameter, {}).items()
        if slot != "round"
    }
    assert moments
    before, average = weights(run), {n: t.clone() for n, t in run.average.items()}
    objective = trainer.objective

    def broken(*args):
        return {name: value * torch.nan for name, value in objective(*args).items()}

    monkeypatch.setattr(trainer, "objective", broken)
    run.train_step()
    assert run.skipped == 1 and run.step == 3
    for parameter, name in run.names.items():
        for slot, value in run.optimiser.state.get(parameter, {}).items():
            assert slot == "round" or torch.equal(value, moments[name, slot]), (name, slot)
    for name, tensor in run.model.state_dict().items():
        # The quantiles have a loss and an optimiser of their own.
        assert torch.equal(tensor, before[name]) == (name != "entropy_bottleneck.quantiles"), name
    assert all(torch.equal(average[name], run.average[name]) for name in average)
    # The log shows the mean of the other steps.
    report = run.report()
    assert np.isfinite(report["loss"]) and report["skipped"] == 1
    json.dumps(report, allow_nan=False)


def test_gradients_are_clipped(folder):
    run = make_trainer(folder, clip=0.01)
    norm = run.train_step()["grad_norm"]
    clipped = torch.stack([p.grad.norm() for p in run.parameters]).norm()  # type: ignore[union-attr]
    assert float(norm) > 0.01
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_average_follows_the_weights(folder):
    run = make_trainer(folder, ema=0.9, lr=1e-2, warmup=0)
    name = "g_s.0.weight" if "g_s.0.weight" in run.average else next(iter(run.average))
    expected = run.average[name].clone()
    for step in range(4):
        run.train_step()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * run.model.get_parameter(name).detach()
    assert torch.allclose(run.average[name], expected, atol=1e-6)
    assert not torch.allclose(run.average[name], run.model.get_parameter(name), atol=1e-4)
    finished = run.finished_model()
    assert torch.equal(finished.get_parameter(name), run.average[name])
    without = make_trainer(folder, ema=0.0)
    without.train_step()
    kept = without.finished_model().get_parameter(name)
    assert torch.equal(kept, without.model.get_parameter(name))


def test_adamw_decays_weights_and_nothing_else(folder):
    run = make_trainer(folder, optimiser="adamw", weight_decay=0.1)
    decaying, others = [
        {run.names[p] for p in group["params"]} for group in run.optimiser.param_groups
    ]
    assert {group["weight_decay"] for group in run.optimiser.param_groups} == {0.1, 0.0}
    assert decaying | others == {run.names[p] for p in run.parameters}
    assert all(name.endswith("weight") for name in decaying)
    names = (".bias", "A_log", ".D", "dt_weight", "norm.weight", "gain.", "entropy_bottleneck.")
    assert not [name for name in decaying if any(part in name for part in names)]


def test_bf16_is_for_the_transforms_alone(folder):
    run = make_trainer(folder, precision="bf16", batch=[2])
    seen = {}

    def watch(name):
        def hook(module, args, output):
            first = args[0][0] if isinstance(args[0], tuple) else args[0]
            seen[name] = (first.dtype, getattr(output, "dtype", None))

        return hook

    run.model.g_a.register_forward_hook(watch("g_a"))
    run.model.context.register_forward_hook(watch("context"))
    run.model.h_s.register_forward_hook(watch("h_s"))
    scanned = []
    with pytest.MonkeyPatch.context() as patch:
        from cmamba_ref.ops.chunked import op

        forward = op._scan_2d

        def watched(x, *args):
            scanned.append(x.dtype)
            return forward(x, *args)

        patch.setattr(op, "_scan_2d", watched)
        record = run.train_step()
    assert seen["g_a"][1] == torch.bfloat16
    assert seen["h_s"][0] == seen["context"][0] == seen["context"][1] == torch.float32
    assert scanned and set(scanned) == {torch.float32}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    exact = make_trainer(folder, batch=[2]).train_step()
    assert float(record["loss"]) == pytest.approx(float(exact["loss"]), rel=0.05)
    assert record["loss"] != exact["loss"]


@pytest.mark.parametrize("capabilities", [{}, {"avx2": True}, {"avx512_bf16": True}])
def test_auto_takes_bf16_where_the_device_has_it(folder, monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert make_trainer(folder, precision="auto").bf16 == ("avx512_bf16" in capabilities)
    assert not make_trainer(folder, precision="fp32").bf16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not make_trainer(folder, precision="auto").bf16
    assert make_trainer(folder, precision="bf16").bf16


class Reads(TorchDispatchMode):
    """Notes where the host asks for the value of a tensor, which on a GPU it would wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "soap"])
def test_a_step_reads_nothing_that_a_gpu_computes(folder, optimiser):
    run = make_trainer(folder, optimiser=optimiser, clip=1.0)
    for _ in range(21):  # also those in which SOAP makes its bases, and renews them
        with Reads() as reads:
            run.train_step()
        # The host's own: whether qualities are in range, whether images on the CPU are in 0...1,
        # and how many steps SOAP has done.
        theirs = [x for x in reads.found if x.dtype not in (torch.bool, torch.int64)]
        assert not theirs
        assert sum(x.dtype == torch.bool for x in reads.found) <= 2
    assert run.report()["loss"] > 0
    run.close()


def test_high_rates_do_not_drown_low_ones(folder):
    """The loss of an image is divided by (lambda / centre)^balance."""
    model = CMamba(SMALL).eval()
    x, quality = torch.rand(2, 3, 64, 64), torch.tensor([1.0, 8.0])
    with torch.no_grad():
        output = dict(model(x, quality))
    plain, balanced = (
        trainer.objective(
            model, output, x, quality, training_helpers.settings(folder, balance=balance)
        )["loss"]
        for balance in (0.0, 0.5)
    )
    lowest, highest = SMALL.lmbdas[0], SMALL.lmbdas[-1]
    ratio = (highest / lowest) ** 0.25  # the centre lies half-way, in log
    assert balanced / plain == pytest.approx([ratio, 1 / ratio], rel=1e-4)


def test_the_logarithm_divides_gradients_by_the_loss(folder):
    losses = torch.tensor([0.5, 30.0], requires_grad=True)
    for log_loss, expected in ((False, [1.0, 1.0]), (True, [1 / 1.5, 1 / 31])):
        loss = trainer.minimised(losses, training_helpers.settings(folder, log_loss=log_loss))
        (grad,) = torch.autograd.grad(loss.sum(), losses)
        assert grad.tolist() == pytest.approx(expected)


def test_the_trainer_minimises_the_logarithm(folder):
    """One crop: the direction is the same, its length divided by 1 + loss."""
    gradients, losses = [], []
    for log_loss in (False, True):
        run = training_helpers.make_trainer(folder, batch=[1], log_loss=log_loss)
        run.model.double()  # so that rounding hides nothing
        losses.append(float(run._gradients(run.next_batch())[0]))
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
        run.close()
    assert losses[0] == pytest.approx(losses[1])
    assert torch.allclose(gradients[1] * (1 + losses[0]), gradients[0], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- checkpoints and log


def test_checkpoints_of_another_format_are_refused(folder):
    with pytest.raises(TrainingError, match=r"format 2, got 1; .*`init`"):
        make_trainer(folder).restore(Checkpoint({}, {"format": 1}))


def test_checkpoints_are_told_from_other_files(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    path = checkpoints.write(tmp_path, 7, Checkpoint({"a": torch.ones(3)}, {"step": 7}))
    (tmp_path / "checkpoint-notes.txt").write_text("none")
    (tmp_path / "checkpoint-000000009-half.safetensors").write_bytes(path.read_bytes())
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.state == {"step": 7}
    assert torch.equal(found.tensors["a"], torch.ones(3))
    with pytest.raises(TrainingError, match="no name of a checkpoint"):
        checkpoints.read(tmp_path / "checkpoint-000000009-half.safetensors")
    other = path.with_name(path.name.replace(path.name.split("-")[2][:16], "0" * 16))
    path.rename(other)
    with pytest.raises(TrainingError, match="damaged"):
        checkpoints.newest(tmp_path)


def test_checkpoints_of_an_abandoned_future_do_not_count(tmp_path):
    """After going back from a damaged checkpoint, that one must not push out the good ones."""
    for step in (1, 2, 3, 9):
        checkpoints.write(tmp_path, step, Checkpoint({}, {"step": step}))
    checkpoints.prune(tmp_path, 3, keep=2)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == [2, 3]
    checkpoints.write(tmp_path, 3, Checkpoint({}, {"step": 3, "again": True}))
    checkpoints.prune(tmp_path, 3, keep=2)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == [2, 3]
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.state == {"step": 3, "again": True}


def test_log_is_cut_back_to_where_a_run_goes_on(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"event": "start", "step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo'
    )
    log = Log(tmp_path, step=2)
    log.write({"step": 3, "again": True})
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert json.loads(lines[-1])["again"]
