"""Evaluation: what it reports is what lies on disk, and nothing measured is lost."""

import json
from pathlib import Path

import eval_rd
import numpy as np
import pytest
import rd_curves
import rd_measure
import stage_clock
import torch
from classical_codecs import CODECS
from codec_helpers import ONE_RATE, load_image, make_image, random_model
from partial_results import PartialResults
from PIL import Image

import cmamba_ref
from cmamba_ref.metrics import psnr

DEMO_IMAGE = Path(cmamba_ref.__file__).parent / "data" / "coffee.png"
MODEL = Path(__file__).parent / "golden" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two crops of an image, one of them grey."""
    target = tmp_path_factory.mktemp("images")
    with Image.open(DEMO_IMAGE) as image:
        image.crop((0, 0, 170, 200)).save(target / "colour.png")
        image.crop((200, 100, 400, 270)).convert("L").save(target / "grey.png")
    return target


def run(folder: Path, output: Path, *more: str) -> int:
    return eval_rd.main([str(folder), "--model", str(MODEL), "-o", str(output), *more])


@pytest.fixture
def measured(monkeypatch) -> list[rd_measure.Task]:
    """What is measured in this process, in its order."""
    tasks, measure = [], rd_measure.measure
    monkeypatch.setattr(rd_measure, "measure", lambda task: (tasks.append(task), measure(task))[1])
    return tasks


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory) -> tuple[dict, Path]:
    """A report of our codec and one classical one, and the folder of what was kept."""
    target = tmp_path_factory.mktemp("evaluated")
    arguments = ["--qualities", "1", "8", "--codecs", "jpeg420", "--keep", str(target / "kept")]
    assert run(folder, target / "rd.json", *arguments) == 0
    assert not (target / "rd.json.partial").exists()
    return json.loads((target / "rd.json").read_text()), target / "kept"


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("codec", "point", "suffix"), [("cmamba", 1, ".cmb"), ("jpeg420", 3, ".jpg")]
)
def test_report_agrees_with_an_independent_computation(folder, evaluated, codec, point, suffix):
    """From the sizes of files on disk and from the decoded PNGs."""
    ms_ssim = pytest.importorskip("pytorch_msssim").ms_ssim
    report, kept = evaluated
    setting = report[codec]["results"]["quality"][point]
    (at_point,) = (kept / codec).glob(f"*{setting:g}" if codec == "cmamba" else f"{setting}")
    means = {"bpp": [], "psnr-rgb": [], "ms-ssim-rgb": []}
    for k, name in enumerate(report["meta"]["images"]["names"]):
        original = np.array(Image.open(folder / name).convert("RGB")).astype(np.float64)
        decoded = np.array(Image.open(at_point / f"{name}.decoded.png")).astype(np.float64)
        x, y = (torch.from_numpy(p).permute(2, 0, 1)[None] for p in (original, decoded))
        size = (at_point / f"{name}{suffix}").stat().st_size
        row = {
            "bpp": 8 * size / (original.shape[0] * original.shape[1]),
            "psnr-rgb": 20 * np.log10(255 / np.sqrt(np.mean((original - decoded) ** 2))),
            "ms-ssim-rgb": float(ms_ssim(x, y, data_range=255)),
        }
        for measure, value in row.items():
            assert report[codec]["per_image"][point][k][measure] == pytest.approx(value)
            means[measure].append(value)
    for measure, values in means.items():
        assert report[codec]["results"][measure][point] == pytest.approx(np.mean(values))


def test_the_files_are_those_of_the_codec(folder, evaluated):
    report, kept = evaluated
    model = cmamba_ref.CMamba.from_pretrained(MODEL)
    data = cmamba_ref.encode(load_image(folder / "colour.png"), model, 8)
    point = f"{model.model_id.hex()}-8"
    assert (kept / "cmamba" / point / "colour.png.cmb").read_bytes() == data
    assert report["cmamba"]["results"]["model"] == [model.model_id.hex()] * 2


def test_times_are_split_by_stage(evaluated):
    report, _ = evaluated
    for row in [row for rows in report["cmamba"]["per_image"] for row in rows]:
        for direction in ("encoding", "decoding"):
            parts = [row[f"{direction}_time_{group}"] for group in rd_measure.GROUPS]
            assert sum(parts) == pytest.approx(row[f"{direction}_time"])
            assert min(parts[:3]) > 0
            assert row[f"{direction}_peak_bytes"] > 50e6  # torch alone takes more


def test_every_stage_has_its_group():
    model = random_model(ONE_RATE)
    stages = {stage for stage, _ in stage_clock.stages_of(model)} | {"entropy coder"}
    timing = stage_clock.Timing(total=len(stages) + 2.0, stages=dict.fromkeys(stages, 1.0))
    groups = rd_measure.by_group(timing)
    transforms = sum(stage.startswith(("g_a", "g_s")) for stage in stages)
    assert groups == {
        "time_transform": transforms,
        "time_entropy_parameters": len(stages) - transforms - 1,
        "time_coder": 1,
        "time_other": 2,
    }


def test_layout(evaluated):
    """One object per codec, as CompressAI has it, and what it was measured with."""
    report, _ = evaluated
    assert set(report) == {"cmamba", "jpeg420", "meta"}
    for codec in ("cmamba", "jpeg420"):
        curve = report[codec]
        points = len(curve["results"]["quality"])
        assert curve["name"] and curve["description"]
        assert all(len(values) == points for values in curve["results"].values())
        assert [len(rows) for rows in curve["per_image"]] == [2] * points
    jpeg = report["jpeg420"]["results"]
    assert jpeg["bpp"] == sorted(jpeg["bpp"]) and jpeg["psnr-rgb"] == sorted(jpeg["psnr-rgb"])
    for key in ("command", "commit", "machine", "versions", "models", "threads", "jobs"):
        assert report["meta"][key]
    rates = report["meta"]["bd_rates"]
    assert set(rates) == {"psnr", "ms-ssim"} and rates["psnr"]["anchor"]["name"] == "jpeg420"
    assert "the test has 2" in rates["psnr"]["codecs"][0]["refused"]


# ---------------------------------------------------------------- classical codecs


@pytest.mark.parametrize("key", CODECS)
def test_classical_codecs_trade_rate_for_quality(key):
    codec = CODECS[key]
    if not codec.is_available():
        pytest.skip(f"this Pillow has no {codec.format}")
    image = make_image(96, 128)
    sizes, errors = [], []
    for setting in codec.settings[::3]:
        data = codec.encode(image, setting)
        sizes.append(len(data))
        errors.append(np.mean((codec.decode(data).astype(float) - image) ** 2))
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    assert any(character.isdigit() for character in codec.version())


@pytest.mark.parametrize(("key", "name"), [("jpeg420",) * 2, ("webp",) * 2, ("jpeg2000", "jp2")])
def test_classical_codecs_as_measured_elsewhere(kodak_paths, shared_dir, key, name):
    """Means over Kodak, measured by other code; other versions of a library move them a little."""
    table = shared_dir / "rd" / "measured_kodak.json"
    if not table.is_file() or not CODECS[key].is_available():
        pytest.skip("no measured points in `shared/rd`, or no such codec")
    curve = json.loads(table.read_text())["codecs"][name]
    k = len(curve["setting"]) // 2
    rates, qualities = [], []
    for path in kodak_paths:
        original = load_image(path)
        data = CODECS[key].encode(original, curve["setting"][k])
        rates.append(8 * len(data) * 3 / original.size)
        qualities.append(psnr(original, CODECS[key].decode(data)))
    assert np.mean(rates) == pytest.approx(curve["bpp"][k], rel=0.01)
    assert np.mean(qualities) == pytest.approx(curve["psnr"][k], abs=0.1)


def test_avif_is_tuned_for_psnr():
    codec, plain = CODECS["avif"], CODECS["avif-default"]
    if not codec.is_available():
        pytest.skip("this Pillow has no AVIF")
    image = load_image(DEMO_IMAGE)[:200, :256]
    tuned, by_default = (psnr(image, c.decode(c.encode(image, 50))) for c in (codec, plain))
    assert tuned > by_default + 0.5


# ---------------------------------------------------------------- sweeps


def test_several_models_are_points_of_one_curve_or_curves_of_their_own(folder, tmp_path, capsys):
    for seed in (0, 1):
        random_model(ONE_RATE, seed).save_pretrained(tmp_path / f"lambda{seed}")
    low, high = str(tmp_path / "lambda0"), str(tmp_path / "lambda1")
    arguments = [str(folder), "--limit", "1", "--codecs", "-o", str(tmp_path / "rd.json")]
    models = ["--model", f"both={low}", high, "--model", f"alone={high}"]
    with pytest.raises(SystemExit):
        eval_rd.main([*arguments, *models, "--qualities", "3"])
    assert "these have one rate" in capsys.readouterr().err
    assert eval_rd.main([*arguments, *models]) == 0
    report = json.loads((tmp_path / "rd.json").read_text())
    assert set(report) == {"both", "alone", "meta"}
    both, alone = report["both"]["results"], report["alone"]["results"]
    assert both["quality"] == [None, None] and alone["quality"] == [None]
    assert both["model"][0] != both["model"][1] == alone["model"][0]
    assert both["bpp"][1] == alone["bpp"][0] != both["bpp"][0]
    assert [m["name"] for m in report["meta"]["models"]["both"]] == [ONE_RATE.name] * 2


def test_several_processes_measure_the_same(folder, evaluated, tmp_path):
    report, _ = evaluated
    arguments = ["--qualities", "1", "8", "--codecs", "jpeg420", "--jobs", "2"]
    assert run(folder, tmp_path / "rd.json", *arguments) == 0
    again = json.loads((tmp_path / "rd.json").read_text())
    assert again["meta"]["jobs"] == 2
    for codec in ("cmamba", "jpeg420"):
        for measure in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
            assert again[codec]["results"][measure] == report[codec]["results"][measure]


def test_classical_codecs_of_an_earlier_report_are_reused(folder, tmp_path, measured):
    earlier, again, third = (tmp_path / f"{name}.json" for name in ("earlier", "again", "third"))
    arguments = ["--qualities", "1", "--codecs", "jpeg420", "webp", "--brief"]
    assert run(folder, earlier, *arguments) == 0
    report = json.loads(earlier.read_text())
    report["jpeg420"]["results"]["bpp"][0] = 0.001  # no measurement gives this
    report["webp"]["description"] = "Pillow, another version"
    earlier.write_text(json.dumps(report))

    measured.clear()
    assert run(folder, again, *arguments, "--reuse", str(earlier)) == 0
    assert {task.point.codec for task in measured} == {"cmamba", "webp"}
    found = json.loads(again.read_text())
    assert found["jpeg420"] == report["jpeg420"]
    # How they were measured stays known, also if they are taken over again.
    assert found["meta"]["reused"]["command"] == report["meta"]["command"]
    assert run(folder, third, *arguments, "--reuse", str(again)) == 0
    assert json.loads(third.read_text())["meta"]["reused"] == found["meta"]["reused"]
    measured.clear()
    assert run(folder, third, *arguments[:-1], "--reuse", str(earlier)) == 0
    assert "jpeg420" in {task.point.codec for task in measured}  # brief results lack some


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"meta": {"images": {"names": []}}}'])
def test_other_reports_are_not_reused(folder, tmp_path, capsys, content):
    (tmp_path / "earlier.json").write_text(content)
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "rd.json", "--reuse", str(tmp_path / "earlier.json"))
    assert "--reuse must be a report" in capsys.readouterr().err


def interval_on(images: int, noise: float) -> tuple[float, float] | None:
    """The interval of a codec that takes half of the anchor's bits, give or take."""
    draw = np.random.default_rng(3)
    report = {}
    for name, part in (("anchor", 1.0), ("half", 0.5)):
        spread = np.exp(noise * draw.normal(size=(6, images)))
        rows = [
            [{"bpp": part * 0.2 * 1.6**k * float(x), "psnr-rgb": 26.0 + 2 * k} for x in spread[k]]
            for k in range(6)
        ]
        results = {"bpp": [1.0], "psnr-rgb": [1.0]}  # only the rows count
        report[name] = {"results": results, "per_image": rows}
    return eval_rd.interval(report, *rd_curves.curves_in(report, Path("this run")), "psnr")


def test_the_interval_of_a_bd_rate_holds_it_and_widens_with_the_spread_of_images():
    low, high = interval_on(24, 0.02)
    assert low < -50 < high and high - low < 1.5
    wide = interval_on(24, 0.2)
    assert wide[1] - wide[0] > 4 * (high - low)
    assert interval_on(24, 0.0) == (-50, -50)
    assert interval_on(7, 0.02) is None


def test_brief_sweeps_have_the_same_sizes_and_psnr(folder, evaluated, tmp_path, capsys):
    report, _ = evaluated
    output = tmp_path / "rd.json"
    assert run(folder, output, "--qualities", "1:8:7", "--codecs", "jpeg420", "--brief") == 0
    again = json.loads(output.read_text())
    for codec in ("cmamba", "jpeg420"):
        assert set(again[codec]["results"]) - {"model"} == {"quality", "bpp", "psnr-rgb"}
        for measure in ("quality", "bpp", "psnr-rgb"):
            assert again[codec]["results"][measure] == report[codec]["results"][measure]
    assert again["meta"]["brief"] and "brief" not in report["meta"]
    printed = capsys.readouterr().out
    assert "jpeg420: mean bpp and mean PSNR rise with quality, at every step" in printed


def test_efforts_are_curves(folder, evaluated, tmp_path):
    output, kept = tmp_path / "rd.json", tmp_path / "kept"
    options = ("--qualities", "1", "--codecs", "--brief", "--keep", str(kept))
    assert run(folder, output, "--effort", "0", "1", *options) == 0
    report, (plain, _) = json.loads(output.read_text()), evaluated
    assert report["cmamba"]["results"]["bpp"] == plain["cmamba"]["results"]["bpp"][:1]
    with_effort, without = report["cmamba-effort-1"]["name"], report["cmamba"]["name"]
    assert with_effort == f"{without}, effort 1"
    (file,) = kept.glob("cmamba-effort-1/*/colour.png.cmb")
    model = cmamba_ref.CMamba.from_pretrained(MODEL)
    image = rd_measure.read_rgb(folder / "colour.png")
    assert file.read_bytes() == cmamba_ref.encode(image, model, 1, effort=1)


def test_ranges_of_qualities_have_both_ends():
    assert eval_rd.quality_range("1:8:0.1") == [round(1 + k / 10, 10) for k in range(71)]
    assert eval_rd.quality_range("1:2:0.4") == [1.0, 1.4, 1.8]
    assert eval_rd.quality_range("2.5") == [2.5]
    for wrong in ("1:8", "1:8:0", "8:1:1", "1:8:0.001", "one", "1:inf:1", "nan:8:1"):
        with pytest.raises(ValueError):
            eval_rd.quality_range(wrong)


def test_steps_that_do_not_rise_are_named():
    """In whatever order the points stand, and never from one model to another."""
    points = {"quality": [3, 1, 2, 1], "model": ["a", "a", "a", "b"]}
    report = {
        "ours": {
            "results": points | {"bpp": [3.0, 1.0, 2.0, 0.5], "psnr-rgb": [30.0, 30.0, 31.5, 9.0]}
        },
        "one rate": {"results": {"quality": [None], "bpp": [1.0], "psnr-rgb": [30.0]}},
        "jpeg": {"results": {"quality": [5, 10], "bpp": [1.0, 2.0], "psnr-rgb": [30.0, 31.0]}},
    }
    assert eval_rd.not_rising(report) == {
        "ours": [{"measure": "psnr-rgb", "step": [2, 3], "by": -1.5}],
        "jpeg": [],
    }
    report["jpeg"]["results"]["bpp"][1] = 1.0
    assert [fall["measure"] for fall in eval_rd.not_rising(report)["jpeg"]] == ["bpp"]


# ---------------------------------------------------------------- interruptions and failures


def test_ctrl_c_leaves_what_a_second_run_completes(folder, tmp_path, monkeypatch, capsys, measured):
    output = tmp_path / "rd.json"
    arguments = [folder, output, "--qualities", "1", "--codecs", "jpeg420"]
    measure = rd_measure.measure

    def stop_after_five(task):
        if len(measured) == 5:
            raise KeyboardInterrupt
        return measure(task)

    with monkeypatch.context() as patch:
        patch.setattr(rd_measure, "measure", stop_after_five)
        assert run(*arguments) == 130
    assert "the same command resumes" in capsys.readouterr().err and not output.exists()
    partial = tmp_path / "rd.json.partial"
    kept = [json.loads(line)[2] for line in partial.read_text().splitlines() if line]
    with partial.open("a") as file:
        file.write('\n["cut sho')
    assert run(*arguments) == 0
    assert len(measured) == len(set(measured)) == 2 * (1 + len(CODECS["jpeg420"].settings))
    assert not partial.exists()
    rows = [row for rows in json.loads(output.read_text())["cmamba"]["per_image"] for row in rows]
    assert len(kept) == 5 and all(row in kept for row in rows)


def test_a_failure_is_named_and_the_rest_is_kept(folder, tmp_path, monkeypatch, capsys, measured):
    output = tmp_path / "rd.json"
    measure = rd_measure.measure

    def fail_on_grey(task):
        return "not enough memory" if task.image.name == "grey.png" else measure(task)

    with monkeypatch.context() as patch:
        patch.setattr(rd_measure, "measure", fail_on_grey)
        assert run(folder, output, "--qualities", "1", "--codecs") == 1
    error = capsys.readouterr().err
    assert "grey.png: not enough memory" in error and "is kept in" in error
    assert not output.exists()
    assert run(folder, output, "--qualities", "1", "--codecs") == 0
    assert [task.image.name for task in measured] == ["colour.png", "grey.png"]


def test_what_the_package_refuses_is_one_line(tmp_path):
    point = rd_measure.Point("cmamba", 1.0, str(MODEL))
    outcome = rd_measure.measure(rd_measure.Task(point, tmp_path / "none.png"))
    assert isinstance(outcome, str) and "none.png" in outcome


def test_partial_results_are_used_under_their_conditions_only(tmp_path):
    output = tmp_path / "rd.json"
    PartialResults(output, {"commit": "a", "jobs": 1}).add("key", {"bpp": 1.0})
    assert PartialResults(output, {"commit": "a", "jobs": 1}).results == {"key": {"bpp": 1.0}}
    other = PartialResults(output, {"commit": "b", "jobs": 1})
    assert other.results == {}
    other.add("key", {"bpp": 2.0})
    assert PartialResults(output, {"commit": "a", "jobs": 1}).results == {"key": {"bpp": 1.0}}
    assert PartialResults(output, {"commit": "a", "jobs": 1}, fresh=True).results == {}
    assert PartialResults(output, {"commit": "b", "jobs": 1}).results == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--qualities", "9"], "quality"),
        (["--limit", "0"], "--limit"),
        (["--model", "mine=none"], "config.json"),
        (["--model", str(MODEL)], "name of its own"),
        (["--codecs", "jpeg"], "jpeg420"),
        (["--qualities", "1:8"], "--qualities"),
        (["--jobs", "0"], "--jobs"),
        (["-o", "no/such/folder/rd.json"], "directory"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(folder, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        eval_rd.main([str(folder), "--model", str(MODEL), *change])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flat.png", "torn.png", None])
def test_bad_folders_and_images_are_named(folder, tmp_path, capsys, name):
    (tmp_path / "._hidden.png").write_bytes(b"not an image")
    if name == "flat.png":
        Image.new("RGB", (300, 100)).save(tmp_path / name)
    elif name == "torn.png":
        (tmp_path / name).write_bytes((folder / "colour.png").read_bytes()[:2000])
    with pytest.raises(SystemExit) as stopped:
        eval_rd.main([str(tmp_path), "--model", str(MODEL)])
    assert stopped.value.code == 2 and (name or "no images in") in capsys.readouterr().err
