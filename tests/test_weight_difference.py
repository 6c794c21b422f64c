"""Models that are stored as a difference from a bundled one, and the bundled model that is."""

import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pack_difference
import pytest
import torch
from safetensors.numpy import load, load_file, save
from safetensors.torch import save as torch_save

import cmamba_ref
from cmamba_ref import CMamba, WeightsError, bundled, codec, metrics, weight_difference
from cmamba_ref.cli import main
from cmamba_ref.codec import image_codec
from cmamba_ref.model_id import id_of_arrays
from cmamba_ref.weight_difference import DIFFERENCE_FILE, id_in, pack, unpack
from tests.codec_helpers import ENVIRONMENT, load_image, make_image, random_model

Arrays = dict[str, np.ndarray]

BIAS = "entropy_bottleneck.biases.0"


def half(seed: int) -> CMamba:
    """A random model whose weights fit float16."""
    model = random_model(seed=seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.update()
    return model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of the bundled models: `tiny`, and as the difference from it `tuned`."""
    folder = tmp_path / "package"
    half(0).save_pretrained(folder / "tiny")
    half(1).save_pretrained(tmp_path / "made")
    whole, made = (load_file(f / "model.safetensors") for f in (folder / "tiny", tmp_path / "made"))
    (folder / "tuned").mkdir()
    (folder / "tuned" / DIFFERENCE_FILE).write_bytes(pack(made, whole))
    (folder / "tuned" / "config.json").write_bytes((folder / "tiny/config.json").read_bytes())
    monkeypatch.setattr(bundled, "PRETRAINED", folder)
    image_codec._load.cache_clear()
    yield folder
    image_codec._load.cache_clear()


def test_weights_are_within_half_a_step():
    random = np.random.default_rng(0)
    base = {"a": random.normal(size=(40, 50)).astype(np.float16), "t": np.array([0, 1], np.int32)}
    made = {
        "a": base["a"] + random.normal(0, 0.1, (40, 50)).astype(np.float16),
        "t": np.arange(5, dtype=np.int32),
    }
    data = pack(made, base)
    found = unpack(data, lambda _: base)
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {
        name: (a.dtype, a.shape) for name, a in made.items()
    }
    assert np.array_equal(found["t"], made["t"])
    # The nearest power of two to 0.1 / 4 is 1 / 32; float16 has 11 significant bits.
    errors = np.abs(found["a"].astype(np.float64) - made["a"])
    assert (errors <= 1 / 64 + np.abs(found["a"]) * 2.0**-11).all()
    assert errors.max() > 1 / 80
    assert id_in(data) == id_of_arrays(found)


def test_transforms_have_finer_steps():
    random = np.random.default_rng(0)
    base = {name: np.zeros(1000, np.float16) for name in ("g_a.0", "h_a.0", "g_s.1", "bypass.w")}
    made = {name: random.normal(size=1000).astype(np.float16) for name in base}
    found = unpack(pack(made, base), lambda _: base)
    errors = {name: np.abs(found[name] - made[name]).max() for name in base}
    assert errors.pop("h_a.0") > 0.1
    assert max(errors.values()) < 0.035


def test_outliers_are_kept():
    """Differences that 8 bits do not hold, beside others; and none at all."""
    base = {"a": np.zeros(4000, np.float16), "b": np.ones((), np.float16)}
    made = {"a": np.where(np.arange(4000) == 7, 1000, 0.01).astype(np.float16), "b": base["b"]}
    found = unpack(pack(made, base), lambda _: base)
    assert found["a"][7] == pytest.approx(1000, abs=4)
    assert found["b"] == 1 and found["b"].shape == ()


def test_other_models_are_refused():
    base: Arrays = {"a": np.zeros(4, np.float16)}
    others: list[Arrays] = [
        {"b": np.zeros(4, np.float16)},
        {"a": np.zeros(5, np.float16)},
        {"a": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        base | {"b": np.zeros(4, np.float16)},
    ]
    for other in others:
        with pytest.raises(WeightsError, match="same configuration"):
            pack(other, base)
        with pytest.raises(WeightsError, match="same configuration"):
            pack(base, other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_cannot_be_stored_are_refused(value):
    base: Arrays = {"g_a.0": np.zeros(9, np.float16)}
    made: Arrays = {"g_a.0": np.full(9, value, np.float16)}
    with pytest.raises(WeightsError, match="g_a.0 holds NaN or infinity"):
        pack(made, base)


def test_it_is_a_compressed_safetensors_file():
    base, made = {"a": np.zeros(9, np.float16)}, {"a": np.arange(9, dtype=np.float16)}
    stored = load(gzip.decompress(pack(made, base)))
    assert stored["a"].dtype == np.int8
    assert stored["/model"].tobytes() == id_in(pack(made, base))


# ---------------------------------------------------------------- in the package


def test_model_loads_by_name_and_decodes_its_files(package):
    assert bundled.pretrained_names() == ["tiny", "tuned"]
    tuned, whole = CMamba.from_pretrained("tuned"), CMamba.from_pretrained("tiny")
    near, base = half(1).state_dict(), whole.state_dict()
    for name, tensor in tuned.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1000:
            assert (tensor - near[name]).norm() <= 0.12 * (base[name] - near[name]).norm(), name
    data = cmamba_ref.encode(make_image(64, 64), tuned, 4)
    assert bundled.name_of(tuned.model_id) == "tuned"
    assert bundled.name_of(whole.model_id) == "tiny"
    assert np.array_equal(codec.decode(data), codec.decode(data, tuned))


def test_whole_weights_replace_a_difference(package):
    other = half(2)
    other.save_pretrained(package / "tuned")
    assert CMamba.from_pretrained("tuned").model_id == other.model_id
    assert bundled.name_of(other.model_id) == "tuned"


def test_missing_base_is_named(package):
    model_id = CMamba.from_pretrained("tiny").model_id.hex()
    half(2).save_pretrained(package / "tiny")
    with pytest.raises(WeightsError, match=f"difference from model {model_id}, which is not"):
        CMamba.from_pretrained("tuned")


def truncated(data: bytes) -> bytes:
    return data[:-1]


def beheaded(data: bytes) -> bytes:
    return data[1:]


def continued(data: bytes) -> bytes:
    return data + b"more"


def changed(edit: Callable[[Arrays], object]) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        stored = load(gzip.decompress(data))
        edit(stored)
        return gzip.compress(save({k: np.ascontiguousarray(v) for k, v in stored.items()}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        beheaded,
        continued,
        lambda data: b"",
        lambda data: gzip.compress(b"no tensors"),
        changed(lambda stored: stored.pop("/base")),
        changed(lambda stored: stored.pop("/model")),
        changed(lambda stored: stored.update({"/base": np.zeros(10**6, np.uint8)})),
        changed(lambda stored: stored.update({BIAS: np.zeros((1, 1, 40_000_000), np.int8)})),
        changed(lambda stored: stored.update({BIAS: stored[BIAS].astype(np.float32)})),
        lambda data: gzip.compress(torch_save({"a": torch.zeros(1, dtype=torch.bfloat16)})),
        changed(lambda stored: stored.update({"g_a.0.weight": stored["g_a.0.weight"] + 1})),
        changed(lambda stored: stored.update({"g_a.0.weight": stored["g_a.0.weight"][:1, :3]})),
        changed(lambda stored: stored.update({"g_a.0.weight/step": np.zeros(0, np.float32)})),
        changed(lambda stored: stored.update({"g_a.0.weight/step": np.array(1e38, np.float32)})),
        changed(lambda stored: stored.pop("g_a.0.weight/step")),
        changed(lambda stored: stored.pop("g_a.0.weight")),
        changed(
            lambda stored: stored.update(
                {"new": np.ones(1, np.int8), "new/step": np.ones(1, np.float32)}
            )
        ),
    ],
)
def test_damage_is_noticed(package, damage):
    path = package / "tuned" / DIFFERENCE_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=rf"{DIFFERENCE_FILE}.*difference"):
        CMamba.from_pretrained("tuned")


def test_too_large_a_difference_is_refused(package, monkeypatch):
    monkeypatch.setattr(weight_difference, "MAX_BYTES", 100_000)
    with pytest.raises(WeightsError, match="larger than 0.1 MB"):
        CMamba.from_pretrained("tuned")


def test_damage_of_one_model_is_reported_with_its_file(package):
    path = package / "tuned" / DIFFERENCE_FILE
    path.write_bytes(truncated(path.read_bytes()))
    with pytest.raises(WeightsError, match=rf"tuned.{DIFFERENCE_FILE}.*damaged"):
        bundled.name_of(bytes(8))


def test_no_flipped_bit_goes_unnoticed(package):
    path = package / "tuned" / DIFFERENCE_FILE
    whole, header = path.read_bytes(), 10
    for position in np.random.default_rng(0).integers(8 * header, 8 * len(whole), size=60):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(WeightsError):
            CMamba.from_pretrained("tuned")


# ---------------------------------------------------------------- the tool


def test_tool_packs_a_run(package, tmp_path, capsys):
    main = pack_difference.main
    output = package / "again"
    assert main([str(tmp_path / "made"), "--base", "tiny", "-o", str(output)]) == 0
    model = CMamba.from_pretrained("again")
    assert f"model id {model.model_id.hex()}" in capsys.readouterr().out
    assert model.model_id == CMamba.from_pretrained("tuned").model_id
    assert model.config.name == "again"
    for source, target in (("none", "new"), ("made", "package/tiny"), ("made", "made")):
        paths = str(tmp_path / source), str(tmp_path / target)
        before = sorted(tmp_path.rglob("*"))
        assert main([paths[0], "-o", paths[1]]) == 2
        assert "error: " in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit):
        main([str(tmp_path / "made"), "--base", "tuned", "-o", str(output)])


def test_weights_in_single_precision_are_refused():
    base = {"a": np.zeros(3, np.float32)}
    with pytest.raises(WeightsError, match="in float16"):
        pack({"a": np.full(3, np.nan, np.float32)}, base)


def test_an_id_is_found_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, read = CMamba.from_pretrained("tiny").model_id, []
    real = bundled.arrays_in
    monkeypatch.setattr(bundled, "arrays_in", lambda path: read.append(path) or real(path))
    assert bundled.name_of(wanted) == bundled.name_of(wanted) == "tiny"
    assert len(read) <= 1
    half(2).save_pretrained(package / "tiny")  # other weights
    assert bundled.name_of(wanted) is None
    assert len(read) <= 2


def test_a_damaged_package_says_nothing_against_a_file(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(seed=3)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "a.cmb").write_bytes(image_codec.encode(make_image(64, 64), half(0)))
    (package / "tiny" / "model.safetensors").write_bytes(b"damaged")
    args = ["verify", str(tmp_path / "a.cmb"), "--model", str(tmp_path / "other"), "--jobs", "1"]
    assert main(args) == 1
    out = capsys.readouterr().out
    assert out.startswith("not checked: ") and "bad 0, not checked 1" in out


# ---------------------------------------------------------------- tiny-msssim


def test_tiny_msssim_is_better_by_ms_ssim(root: Path) -> None:
    pytest.importorskip("pytorch_msssim")
    image = np.array(load_image(next((root / "cmamba_ref" / "data").glob("*.png"))))
    size, quality = {}, {}
    for name in ("tiny", "tiny-msssim"):
        data = cmamba_ref.encode(image, CMamba.from_pretrained(name), 4)
        size[name], quality[name] = len(data), metrics.ms_ssim(codec.decode(data), image)
    assert size["tiny-msssim"] < 0.95 * size["tiny"]
    assert quality["tiny-msssim"] > quality["tiny"]


def test_a_model_is_named_without_torch() -> None:
    code = (
        "import sys; from cmamba_ref.bundled import name_of, pretrained_names\n"
        "assert 'tiny-msssim' in pretrained_names() and name_of(bytes(8)) is None\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
