"""Decoding elsewhere gives the same symbols; the margin that makes it a guarantee."""

import copy
import itertools
import json
import math
from contextlib import nullcontext
from pathlib import Path

import determinism
import numpy as np
import pytest
import torch
from codec_helpers import (
    QUALITIES,
    assert_same_coding,
    field_of,
    load_image,
    make_image,
    random_model,
    recording,
    run_elsewhere,
    shipped_model,
    with_field,
    without_onednn,
)
from PIL import Image

import cmamba_ref
from cmamba_ref import CMambaError
from cmamba_ref.entropy.gaussian import (
    LOG_SCALE_MIN,
    LOG_SCALE_STEP,
    MARGIN,
    MAX_SHIFT,
    SCALE_LEVELS,
    SHIFT,
    choose_shift,
    scale_index,
)

# Decoding in another process, under other circumstances.


def decode_all(folder: Path) -> None:
    """Runs in the other process: one thread, no oneDNN, all of the model channels-last."""
    torch.set_num_threads(1)
    model = shipped_model().to(memory_format=torch.channels_last)
    for path in sorted(folder.glob("*.cmb")):
        with without_onednn(), recording() as seen:
            decoded = cmamba_ref.decode(path.read_bytes(), model)
        np.savez(path.with_suffix(".npz"), decoded=decoded, **vars(seen[0]))


def check_elsewhere(images: dict[str, tuple[np.ndarray, float]], folder: Path) -> None:
    """Encode and decode here, decode there, compare."""
    model, here = shipped_model(), {}
    for name, (image, quality) in images.items():
        data = cmamba_ref.encode(image, model, quality)
        (folder / f"{name}.cmb").write_bytes(data)
        with recording() as seen:
            decoded = cmamba_ref.decode(data, model)
        here[name] = decoded, seen[0]
    run_elsewhere("test_determinism.decode_all", folder)
    for name, (decoded, seen) in here.items():
        there = dict(np.load(folder / f"{name}.npz"))
        difference = np.abs(there.pop("decoded").astype(int) - decoded.astype(int))
        assert_same_coding(type(seen)(**there), seen)
        assert difference.max() <= 1, name


@pytest.mark.parametrize(
    "every", [2, pytest.param(1, marks=pytest.mark.slow)], ids=["every-second", "all"]
)
def test_kodak_decodes_the_same_in_another_process(kodak_paths, tmp_path, every):
    images = {
        path.stem: (load_image(path), QUALITIES[(k + 2) % len(QUALITIES)])
        for k, path in enumerate(kodak_paths[::every])
    }
    check_elsewhere(images, tmp_path)


def test_odd_sizes_decode_the_same_in_another_process(tmp_path):
    sizes = [(1, 1), (1, 300), (300, 1), (63, 65), (130, 190)]
    check_elsewhere(
        {f"{h}x{w}": (make_image(h, w), q) for (h, w), q in zip(sizes, QUALITIES, strict=True)},
        tmp_path,
    )


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("encoding", "decoding"),
    [
        (nullcontext, without_onednn),
        (nullcontext, autocast),
        (nullcontext, lambda: cmamba_ref.scan_backend("reference")),
        (nullcontext, torch.inference_mode),
        (autocast, nullcontext),
    ],
    ids=["no-onednn", "autocast", "reference-scan", "inference-mode", "encoded-under-autocast"],
)
def test_symbols_do_not_depend_on(encoding, decoding):
    model = random_model()
    with recording() as encoded, encoding():
        data = cmamba_ref.encode(make_image(100, 130), model, 4)
    with recording() as decoded, decoding():
        cmamba_ref.decode(data, model)
    assert_same_coding(decoded[0], encoded[0])
    for seen in (encoded[0], decoded[0]):  # the path from z_hat on runs in float64
        assert seen.y_bar.dtype == seen.log_scales.dtype == np.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_and_a_cpu_read_each_other_s_files():
    on_cpu, on_gpu = shipped_model(), copy.deepcopy(shipped_model()).to("cuda")
    image = make_image(300, 500)
    for writer, reader in ((on_cpu, on_gpu), (on_gpu, on_cpu)):
        with recording() as encoded:
            data = cmamba_ref.encode(image, writer, 4)
        with recording() as decoded:
            there = cmamba_ref.decode(data, reader)
        assert_same_coding(decoded[0], encoded[0])
        here = cmamba_ref.decode(data, writer)
        assert np.abs(there.astype(int) - here.astype(int)).max() <= 1


# The margin.


def boundary(k: int, shift: int) -> float:
    """The log-scale at which level k - 1 becomes level k, k = 1...63, as docs/format.md has it."""
    return LOG_SCALE_MIN + LOG_SCALE_STEP * (k - 0.5 - shift / 65536)


def distance_to_boundaries(log_scales: np.ndarray, shift: int) -> float:
    """Of the log-scale that is nearest to any boundary, in ln units."""
    boundaries = np.array([boundary(k, shift) for k in range(1, SCALE_LEVELS)])
    return float(np.abs(log_scales.ravel()[:, None] - boundaries).min())


def test_the_levels_are_those_of_the_page():
    assert (SCALE_LEVELS, MARGIN, SHIFT, MAX_SHIFT) == (64, 1e-9, 1 / 65536, 255)
    assert math.exp(LOG_SCALE_MIN) == pytest.approx(0.11, rel=1e-15)
    assert math.exp(LOG_SCALE_MIN + 63 * LOG_SCALE_STEP) == pytest.approx(256, rel=1e-14)
    levels = LOG_SCALE_MIN + LOG_SCALE_STEP * torch.arange(64, dtype=torch.float64)
    assert scale_index(levels, 0).tolist() == list(range(64))
    assert scale_index(torch.tensor([-1e300, 1e300], dtype=torch.float64), 9).tolist() == [0, 63]


@pytest.mark.parametrize("shift", [0, 1, 255])
@pytest.mark.parametrize("k", [1, 2, 31, 62, 63])
def test_boundaries_lie_where_the_page_says(k, shift):
    sides = torch.tensor([-1e-11, 1e-11], dtype=torch.float64) + boundary(k, shift)
    assert scale_index(sides, shift).tolist() == [k - 1, k]


@pytest.mark.parametrize("k", [1, 2, 40, 63])
@pytest.mark.parametrize("offset", [0.0, 0.99e-9, -0.99e-9])
def test_a_scale_on_a_boundary_forces_the_next_shift(k, offset):
    scales = torch.linspace(-2, 5, 7, dtype=torch.float64)
    assert choose_shift(scales) == 0
    on_first = torch.cat([scales, scales.new_tensor([boundary(k, 0) + offset])])
    assert choose_shift(on_first) == 1
    on_both = torch.cat([on_first, scales.new_tensor([boundary(64 - k, 1) + offset])])
    assert choose_shift(on_both) == 2


def test_scales_beyond_the_outer_boundaries_need_no_shift():
    below = boundary(1, 0) - LOG_SCALE_STEP  # where a boundary between levels -1 and 0 would be
    above = boundary(63, 0) + LOG_SCALE_STEP
    assert choose_shift(torch.tensor([below, above, -100, 100], dtype=torch.float64)) == 0


def test_scales_on_the_boundaries_of_every_shift_are_refused():
    taken = [boundary(1 + shift % 63, shift) for shift in range(MAX_SHIFT + 1)]
    with pytest.raises(CMambaError, match="another quality"):
        choose_shift(torch.tensor(taken, dtype=torch.float64))
    assert choose_shift(torch.tensor(taken[:-1], dtype=torch.float64)) == MAX_SHIFT


@pytest.mark.parametrize("seed", range(5))
def test_an_error_below_the_margin_changes_no_index(seed):
    """A million scales, hundreds of them pushed close to boundaries."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-4, 7, 1_000_000)
    near = [boundary(k, 0) for k in rng.integers(1, 64, 300)] + rng.normal(0, 1e-8, 300)
    log_scales = torch.from_numpy(np.concatenate([values, near]))
    shift = choose_shift(log_scales)
    assert shift > 0
    assert min(
        distance_to_boundaries(part, shift) for part in np.array_split(log_scales.numpy(), 50)
    ) >= MARGIN * (1 - 1e-5)
    index = scale_index(log_scales, shift)
    for error in (0.9e-9, -0.9e-9):
        assert torch.equal(scale_index(log_scales + error, shift), index)


def test_a_file_that_needed_a_shift_decodes():
    """The first scale is put on a boundary by moving the bias it ends with, in float64."""
    model = random_model()
    image = make_image(64, 64)
    with recording() as seen:
        assert field_of(cmamba_ref.encode(image, model, 4), "shift") == 0
    head = model.context.cae[0].head
    first = seen[0].log_scales[0]
    nearest = min((boundary(k, 0) for k in range(1, 64)), key=lambda b: abs(b - first))
    head.bias.data = head.bias.data.double()
    head.bias.data[head.bias.numel() // 2] += nearest - first
    with recording() as encoded:
        data = cmamba_ref.encode(image, model, 4)
    assert abs(encoded[0].log_scales[0] - nearest) < 1e-12
    assert field_of(data, "shift") == 1
    assert distance_to_boundaries(encoded[0].log_scales, 1) >= MARGIN
    with recording() as decoded:
        cmamba_ref.decode(data, model)
    assert np.array_equal(decoded[0].symbols, encoded[0].symbols)


def test_every_scale_of_a_kodak_image_keeps_the_margin(kodak_paths):
    model = shipped_model()
    with recording() as seen:
        data = cmamba_ref.encode(load_image(kodak_paths[3]), model, 4)
    parts = np.array_split(seen[0].log_scales, 20)
    assert min(distance_to_boundaries(part, field_of(data, "shift")) for part in parts) >= MARGIN


# All combinations of settings (tools/determinism.py).


def test_the_pairs_of_encoder_and_decoder_cover_all_settings():
    jobs = determinism.find_pairs([Path("a.png")], "tiny", determinism.BACKENDS, 16, Path())
    rows = [job.encoder + job.decoder for job in jobs]
    values = [set(column) for column in zip(*rows, strict=True)]
    assert [len(column) for column in values] == 2 * [2, 2, 2, 2, 2, 2]
    for one, other in itertools.combinations(range(len(values)), 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(values[one], values[other]))


OTHER = {"onednn": False, "layout": "channels_last", "backend": "reference"}


@pytest.fixture
def job(tmp_path):
    """Make a job of two images for two settings, with the small random model; they are encoded."""
    for i in range(2):
        Image.fromarray(make_image(70, 90, seed=i)).save(tmp_path / f"{i}.png")

    def make(encoder: dict | None = None, **decoder):
        settings = [determinism.Setting(**setting) for setting in (encoder or {}, decoder)]
        sources = tuple(
            determinism.Source(tmp_path / f"{i}.png", None, 4, "float32", tmp_path / f"{i}.npz")
            for i in range(2)
        )
        made = determinism.Job(determinism.SMALL_MODEL, *settings, sources)
        determinism.write(made)
        return made

    return make


def test_the_parameters_that_are_compared_are_those_of_the_decoder(job):
    one = job().sources[0]
    model = determinism.load_model(determinism.SMALL_MODEL, "contiguous", "float32")
    data = cmamba_ref.encode(one.pixels(), model, one.quality)
    with recording() as seen:
        decoded = cmamba_ref.decode(data, model)
    kept = np.load(one.kept)
    assert kept["data"].tobytes() == data and np.array_equal(kept["pixels"], decoded)
    assert np.array_equal(kept["parameters"][1].ravel(), seen[0].log_scales)
    indexes = determinism.scale_indexes(data, kept["parameters"])
    assert np.array_equal(indexes.ravel(), seen[0].indexes[-indexes.size :])


def test_entropy_parameters_agree_under_other_settings(job):
    found = determinism.read(job(**OTHER, batch=4, weights="bfloat16"))
    # The second image of the batch of four is taken twice.
    assert (found["files"], found["indexes"]) == (4, 4 * 16 * 8 * 8)
    assert found["differing_indexes"] == found["files_with_other_symbols"] == 0
    assert 0 < found["ln_scale_absolute"] < 1e-12
    assert 0 < found["mean_absolute"] < 1e-12


def test_pixels_agree_under_other_settings(job):
    """One encodes two images at a time, the other decodes one at a time, otherwise too."""
    made = job({"batch": 2, "weights": "bfloat16"}, **OTHER)
    found = determinism.read(made)
    assert (found["files"], found["files_with_other_symbols"]) == (2, 0)
    assert found["bytes"] == sum(np.load(s.kept)["data"].size for s in made.sources)
    assert found["values"] == 2 * 70 * 90 * 3
    assert found["largest_difference"] <= 1


def test_differing_scales_and_means_are_found(job):
    """One log-scale moved across a boundary, one mean by a millionth."""
    made = job()
    one = made.sources[0]
    kept = dict(np.load(one.kept))
    means, log_scales = kept["parameters"]
    log_scales.flat[5] += LOG_SCALE_STEP * (-1 if log_scales.flat[5] > 0 else 1)
    means.flat[7] += 1e-6
    np.savez(one.kept, **kept)
    found = determinism.read(made)
    assert found["differing_indexes"] == 1
    assert found["ln_scale_absolute"] == pytest.approx(LOG_SCALE_STEP)
    assert found["mean_absolute"] == pytest.approx(1e-6, rel=1e-6)


def test_other_symbols_and_pixels_are_found(job):
    """A file with a wrong check of its symbols, and three pixels of the other one moved."""
    made = job({"batch": 2}, **OTHER)
    first, second = (dict(np.load(p.kept)) for p in made.sources)
    data = with_field(first["data"].tobytes(), "symbols' check", 0)
    first["data"] = np.frombuffer(data, np.uint8)
    second["pixels"][0, 0] ^= 4
    for one, kept in zip(made.sources, (first, second), strict=True):
        np.savez(one.kept, **kept)
    found = determinism.read(made)
    assert (found["files_with_other_symbols"], found["values"]) == (1, 70 * 90 * 3)
    assert (found["indexes"], found["differing_indexes"]) == (2 * 16 * 8 * 8, 16 * 8 * 8)
    assert found["ln_scale_absolute"] == np.inf
    assert found["differing_values"] >= 3 and 3 <= found["largest_difference"] <= 5


@pytest.mark.slow
def test_the_command_measures_all_settings(tmp_path):
    """Reduced: one small image and model, one backend, as many pairs as that needs."""
    (tmp_path / "images").mkdir()
    Image.fromarray(make_image(64, 64)).save(tmp_path / "images" / "a.png")
    output = tmp_path / "determinism.json"
    small = ["--model", determinism.SMALL_MODEL, "--backends", "chunked", "--pairs", "10"]
    assert determinism.main([str(tmp_path / "images"), *small, "-o", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["meta"]["all_promises_kept"]
    assert report["images"]["settings"] == len(report["images"]["rows"]) == 32
    assert report["images"]["indexes"] == 32 * 2.5 * 16 * 4 * 4
    assert report["pairs"]["files"] == 40 and report["pairs"]["files_with_other_symbols"] == 0
    assert report["pairs"]["pixels"]["float32"]["values"] > 0
