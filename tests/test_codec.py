"""The codec as its users see it: images to files and back, sizes, CompressAI's protocol, ids."""

import copy
import functools
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from codec_helpers import (
    ONE_RATE,
    QUALITIES,
    SMALL,
    as_input,
    assert_same_coding,
    load_image,
    make_image,
    random_model,
    recording,
    round_trip,
    shipped_model,
    with_field,
)
from torch.nn import functional as F

import cmamba_ref
from cmamba_ref import (
    BitstreamError,
    CMamba,
    CMambaError,
    InvalidArgumentError,
    WeightsError,
    bundled,
    codec,
)
from cmamba_ref.codec import image_codec
from cmamba_ref.codec.container import Container
from cmamba_ref.entropy import rans
from cmamba_ref.entropy.latent_coder import RANS_SLACK
from cmamba_ref.entropy.tables import CdfTables
from cmamba_ref.errors import ModelMismatchError

ODD_SIZES = [
    (1, 1), (1, 2), (2, 1), (1, 64), (65, 1), (1, 700), (700, 1), (2, 3), (7, 200), (31, 33),
    (63, 64), (63, 65), (64, 64), (64, 65), (65, 63), (65, 65), (127, 129), (128, 128),
    (200, 150), (257, 129),
]  # fmt: skip


@functools.cache
def small_model() -> CMamba:
    return random_model()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(np.mean((a.astype(float) - b.astype(float)) ** 2) / 255**2)


# Round trips.


def estimated_bytes(model: CMamba, image: np.ndarray, quality: float | None) -> float:
    """What the model itself expects a file to take."""
    with torch.inference_mode():
        likelihoods = model(as_input(image), quality)["likelihoods"]
    return -sum(float(p.double().log2().sum()) for p in likelihoods.values()) / 8


def test_kodak_through_files(kodak_paths, tmp_path):
    """Symbols equal, y_bar within 1e-9; sizes within 1 % + 64 bytes of the model's estimate.

    Of every third image; all of them are among the slow tests.
    """
    model = shipped_model()
    sizes, estimates = [], []
    for k, path in enumerate(kodak_paths[::3]):
        quality = QUALITIES[k % len(QUALITIES)]
        done = round_trip(model, load_image(path), quality, tmp_path / "photo.cmb")
        sizes.append(done.size)
        estimates.append(estimated_bytes(model, done.image, quality))
    assert np.mean(sizes) <= 1.01 * np.mean(estimates) + 64


def test_one_image_at_every_quality(kodak_paths, tmp_path):
    """More quality costs more bytes; the best is better than the worst; decoding repeats."""
    model, image = shipped_model(), load_image(kodak_paths[22])
    sizes, qualities = [], []
    for quality in QUALITIES:
        done = round_trip(model, image, quality, tmp_path / "photo.cmb")
        sizes.append(done.size)
        qualities.append(psnr(done.decoded, image))
    assert sizes == sorted(sizes) and qualities[0] < qualities[-1]
    again = cmamba_ref.decode((tmp_path / "photo.cmb").read_bytes(), model)
    assert np.array_equal(again, done.decoded)


@pytest.mark.slow
@pytest.mark.parametrize("quality", QUALITIES)
def test_all_of_kodak_at_every_quality(kodak_paths, tmp_path, quality):
    model = shipped_model()
    for path in kodak_paths:
        image = load_image(path)
        done = round_trip(model, image, quality, tmp_path / "photo.cmb")
        assert done.size <= 1.02 * estimated_bytes(model, image, quality) + 64


@pytest.mark.parametrize(("height", "width"), ODD_SIZES)
def test_odd_sizes_through_files(tmp_path, height, width):
    quality = QUALITIES[(height + width) % len(QUALITIES)]
    for model in (shipped_model(), small_model()):
        image = make_image(height, width)
        done = round_trip(model, image, quality, tmp_path / "odd.cmb")
        again = cmamba_ref.decode((tmp_path / "odd.cmb").read_bytes(), model)
        assert np.array_equal(again, done.decoded)


def test_the_random_model_uses_many_scales_and_escapes(tmp_path):
    """What the tests with random weights rest on."""
    done = round_trip(small_model(), make_image(200, 150), 8, tmp_path / "x.cmb")
    tables = small_model().gaussian_conditional.stored.tables()
    z_count = done.encoder.symbols.size - done.encoder.log_scales.size
    symbols, indexes = done.encoder.symbols[z_count:], done.encoder.indexes[z_count:]
    assert len(np.unique(indexes)) > 30 and len(np.unique(symbols)) > 30
    position = symbols - tables.offsets[indexes]
    assert ((position < 0) | (position >= tables.symbol_counts[indexes])).any()
    assert len(np.unique(done.encoder.symbols[:z_count])) > 3


def test_grey_images_stay_grey(tmp_path):
    grey = make_image(70, 51)[..., 0]
    done = round_trip(shipped_model(), grey, 8, tmp_path / "grey.cmb")
    assert done.decoded.shape == (70, 51)
    three = cmamba_ref.encode(np.stack([grey] * 3, axis=-1), shipped_model(), 8)
    assert done.size == len(three)
    rgb = cmamba_ref.decode(three, shipped_model())
    assert np.array_equal(done.decoded, np.rint(rgb.mean(axis=2)))


def test_fixed_rate_model(tmp_path):
    model = random_model(ONE_RATE)
    round_trip(model, make_image(65, 90), None, tmp_path / "one.cmb")
    with pytest.raises(InvalidArgumentError, match="one rate"):
        cmamba_ref.encode(make_image(8, 8), model, 4)


def test_read_only_and_strided_arrays_are_accepted():
    image = make_image(40, 60)
    data = cmamba_ref.encode(image, small_model(), 4)
    frozen = image.copy()
    frozen.flags.writeable = False
    assert cmamba_ref.encode(frozen, small_model(), 4) == data
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    assert cmamba_ref.encode(mirrored, small_model(), 4) == data


@pytest.mark.parametrize(
    ("image", "quality", "reason"),
    [
        (np.zeros((8, 8, 3), np.float32), 4, "`image` must be uint8"),
        (np.zeros((8, 8, 5), np.uint8), 4, "`image` must be uint8"),
        (np.zeros((8, 8, 1), np.uint8), 4, "`image` must be uint8"),
        (np.zeros(8, np.uint8), 4, "`image` must be uint8"),
        (np.zeros((0, 8, 3), np.uint8), 4, "`image` must have 1 to 100000000 pixels"),
        ([[1, 2], [3, 4]], 4, "`image` must be a NumPy array, .* got list"),
        ("photo.png", 4, "`image` must be a NumPy array, .* got str 'photo.png'; read the file"),
        (Path("photo.png"), 4, "got PosixPath.*'photo.png'.*; read the file"),
        (torch.zeros(3, 8, 8), 4, r"got Tensor torch.float32\[3, 8, 8\]; .* call .numpy"),
        (None, 4, "`image` must be a NumPy array, .* got NoneType"),
        (np.zeros((8, 8, 3), np.uint8), 0.99, "`quality` must be"),
        (np.zeros((8, 8, 3), np.uint8), 8.01, "`quality` must be"),
        (
            np.zeros((8, 8, 3), np.uint8),
            math.nan,
            "`quality` must be a number from 1 to 8, got nan",
        ),
        (np.zeros((8, 8, 3), np.uint8), "4", "`quality` must be a number from 1 to 8, got '4'"),
        (np.zeros((8, 8, 3), np.uint8), True, "`quality` must be a number from 1 to 8, got True"),
        (np.zeros((8, 8, 3), np.uint8), [4], "`quality` must be a number from 1 to 8, got .4."),
    ],
)
def test_wrong_images_and_qualities_are_refused(image, quality, reason):
    with pytest.raises(InvalidArgumentError, match=reason):
        cmamba_ref.encode(image, small_model(), quality)


def test_pixel_limit_counts_padded_sides():
    image = make_image(10, 70)
    data = cmamba_ref.encode(image, small_model(), 4, max_pixels=64 * 128)
    assert cmamba_ref.decode(data, small_model(), max_pixels=64 * 128).shape == image.shape
    with pytest.raises(InvalidArgumentError, match="8191 pixels"):
        cmamba_ref.encode(image, small_model(), 4, max_pixels=64 * 128 - 1)
    with pytest.raises(BitstreamError, match="limit of 8191"):
        cmamba_ref.decode(data, small_model(), max_pixels=64 * 128 - 1)


def test_one_row_of_detail_does_not_cost_64():
    """The encoder extends a row of black and white pixels, but not by 63 copies."""
    stripes = np.tile(np.array([[0, 255]], np.uint8), (1, 1024))
    copies = np.repeat(stripes, 64, axis=0)
    assert 3 * len(cmamba_ref.encode(stripes)) < len(cmamba_ref.encode(copies))


def test_quality_may_be_any_real_number():
    image, model = make_image(8, 8), small_model()
    data = cmamba_ref.encode(image, model, 4)
    assert (
        data == cmamba_ref.encode(image, model) == cmamba_ref.encode(image, quality=4, model=model)
    )
    for quality in (4.0, np.float32(4), np.int64(4)):
        assert cmamba_ref.encode(image, model, quality) == data


def test_model_as_first_argument_warns():
    image, model = make_image(8, 8), small_model()
    data = cmamba_ref.encode(image, model, 6.3)
    order = re.escape("write encode(image, model, ...)")
    with pytest.warns(DeprecationWarning, match=order) as caught:
        assert cmamba_ref.encode(model, image, 6.3) == data
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=order):
        assert cmamba_ref.encode(model, image, quality=6.3, max_pixels=4096) == data
    with pytest.warns(DeprecationWarning, match=order):
        assert cmamba_ref.encode(None, image) == cmamba_ref.encode(image)
    with (
        pytest.warns(DeprecationWarning, match=order),
        pytest.raises(InvalidArgumentError, match="`image` must be .* got NoneType"),
    ):
        cmamba_ref.encode(model)


@pytest.mark.parametrize("model", ["tiny", Path("tiny"), torch.nn.Linear(1, 1), make_image(8, 8)])
def test_wrong_model_types_are_refused(model):
    data = cmamba_ref.encode(make_image(8, 8), small_model())
    reason = f"`model` must be a CMamba or None, got {type(model).__name__}.*from_pretrained"
    with pytest.raises(InvalidArgumentError, match=reason):
        cmamba_ref.encode(make_image(8, 8), model)
    with pytest.raises(InvalidArgumentError, match=reason):
        cmamba_ref.decode(data, model)


def test_decode_accepts_any_bytes_like_object():
    model = small_model()
    data = cmamba_ref.encode(make_image(8, 8), model)
    expected = cmamba_ref.decode(data, model)
    for same in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert np.array_equal(cmamba_ref.decode(same, model), expected)
    for wrong in ("photo.cmb", Path("photo.cmb"), None, torch.zeros(3), model):
        reason = f"`data` must be the bytes of a .cmb file, got {type(wrong).__name__}"
        with pytest.raises(InvalidArgumentError, match=reason):
            cmamba_ref.decode(wrong, model)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_default_device_changes_nothing(channels):
    """A program of its own may have set one; "meta" has no values, so using it would fail."""
    model, image = small_model(), make_image(70, 90)
    image = np.dstack([image, image[..., 0]])[..., :channels]
    data = cmamba_ref.encode(image, model, 4)
    with torch.device("meta"):
        assert cmamba_ref.encode(image, model, 4) == data
        assert cmamba_ref.decode(data, model).shape == image.shape
        assert model(torch.rand(1, 3, 64, 64, device="cpu"), 4.0)["x_hat"].device.type == "cpu"


def test_compiled_model_codes_like_the_original():
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    data = cmamba_ref.encode(make_image(8, 8), compiled)
    assert data == cmamba_ref.encode(make_image(8, 8), model)
    assert np.array_equal(cmamba_ref.decode(data, compiled), cmamba_ref.decode(data, model))


# CompressAI's protocol.


def evaluate_like_compressai(net, x: torch.Tensor) -> dict[str, float]:
    """The steps of CompressAI's eval_model, for one image `[1, 3, H, W]`."""
    height, width = x.shape[-2:]
    pad = (0, -width % 64, 0, -height % 64)
    x_padded = F.pad(x, pad, mode="constant", value=0)
    out_enc = net.compress(x_padded)
    out_dec = net.decompress(out_enc["strings"], out_enc["shape"])
    x_hat = F.pad(out_dec["x_hat"], tuple(-p for p in pad))
    out_net = net.forward(x_padded)
    out_net["x_hat"].clamp_(0, 1)
    bits = sum(torch.log(p).sum() / -math.log(2) for p in out_net["likelihoods"].values())
    return {
        "mse": float(F.mse_loss(x, x_hat)),
        "mse_estimated": float(F.mse_loss(x, F.pad(out_net["x_hat"], tuple(-p for p in pad)))),
        "bpp": sum(len(s[0]) for s in out_enc["strings"]) * 8.0 / (height * width),
        "bpp_estimated": float(bits) / (height * width),
    }


@pytest.mark.parametrize("config", [ONE_RATE, SMALL], ids=["one rate", "all rates"])
@torch.no_grad()
def test_compressai_evaluation_runs_on_a_model(config):
    """A model of all rates is evaluated at its default quality."""
    net = random_model(config)
    assert net.update(force=True) is True and net.update() is False
    assert net.aux_loss().ndim == 0 and float(net.aux_loss()) > 0
    result = evaluate_like_compressai(net, as_input(make_image(120, 200)))
    assert result["mse"] == pytest.approx(result["mse_estimated"], rel=0.01)
    # An estimate never counts a symbol as less likely than 1e-9, 30 bits; an escape costs less.
    assert 0.8 * result["bpp_estimated"] < result["bpp"] < 1.05 * result["bpp_estimated"]


def test_decoding_a_batch_equals_decoding_each_image():
    model = small_model()
    x = torch.cat([as_input(make_image(128, 64, seed)) for seed in range(3)])
    out = model.compress(x, 6.3)
    batch, _ = model.decode_latent(out["strings"], out["shape"])
    x_hat = model.decompress(out["strings"], out["shape"])["x_hat"]
    for b, strings in enumerate(zip(*out["strings"], strict=True)):
        alone, _ = model.decode_latent([[s] for s in strings], out["shape"])
        assert float((batch[b] - alone[0]).abs().max()) <= 1e-9
        alone = model.decompress([[s] for s in strings], out["shape"])["x_hat"]
        assert float((x_hat[b] - alone[0]).abs().max()) < 1 / 255


def test_a_batch_may_mix_qualities_when_decoding():
    model = small_model()
    x = as_input(make_image(64, 64))
    out = [model.compress(x, quality) for quality in (1, 8)]
    strings = [[o["strings"][k][0] for o in out] for k in range(2)]
    mixed = model.decompress(strings, out[0]["shape"])["x_hat"]
    for b, o in enumerate(out):
        alone = model.decompress(o["strings"], o["shape"])["x_hat"][0]
        assert float((mixed[b] - alone).abs().max()) < 1 / 255


def test_encoding_a_batch_equals_encoding_each_image():
    """g_a runs in float32, so a symbol in many may round the other way; no more than that."""
    model = small_model()
    x = torch.cat([as_input(make_image(128, 64, seed)) for seed in range(3)])
    out = model.compress(x, 4)
    batch, _ = model.decode_latent(out["strings"], out["shape"])
    for b in range(3):
        alone = model.compress(x[b : b + 1], 4)
        y_bar, _ = model.decode_latent(alone["strings"], alone["shape"])
        assert float(((batch[b] - y_bar[0]).abs() > 1e-9).double().mean()) < 0.01


def test_compress_and_decompress_use_the_latent_coder():
    model = small_model()
    x, coder = as_input(make_image(70, 130)), model.latent_coder
    with torch.no_grad():
        y = model.analyze(x, 6.3)
        symbols = coder.symbols(y, model.h_a(y))
    assert [tuple(s.shape[1:]) for s in (y, symbols.z)] == list(
        model.latent_shapes(70, 130).values()
    )
    assert all(torch.equal(s, s.round()) for s in (symbols.z, *symbols.y))
    out = coder.encode(symbols, 6.3)
    assert out == model.compress(x, 6.3)
    y_bar, quality = coder.decode(**out)
    assert y_bar.dtype == torch.float64 and quality.tolist() == [6.3]
    x_hat = model.reconstruct(y_bar, quality)
    assert torch.equal(x_hat, model.decompress(**out)["x_hat"])


def test_pickled_model_codes_equally():
    model, x = random_model(), as_input(make_image(40, 60))
    out = model.compress(x, 4)
    again = pickle.loads(pickle.dumps(model))
    assert again.compress(x, 4) == out and again.model_id == model.model_id
    for parameter in again.context.parameters():
        parameter.data.add_(0.1)
    assert again.compress(x, 4) != out == model.compress(x, 4)


# Ids and tables.


def changed_in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] += 1


def changed_through_data(tensor: torch.Tensor) -> None:
    tensor.data.view(-1)[-1] += 1


@pytest.mark.parametrize("change", [changed_in_place, changed_through_data])
def test_model_id_covers_every_weight_and_table(change):
    model = random_model()
    ids = {model.model_id}
    tensors = model.state_dict(keep_vars=True)
    for tensor in tensors.values():
        change(tensor)
        ids.add(model.model_id)
    assert len(ids) == len(tensors) + 1


def test_model_id_depends_on_weights_alone(tmp_path):
    model = random_model()
    assert random_model().model_id == model.model_id != random_model(seed=1).model_id
    assert copy.deepcopy(model).model_id == model.model_id
    model.save_pretrained(tmp_path)
    assert CMamba.from_pretrained(tmp_path).model_id == model.model_id
    assert len(model.model_id) == 8


def test_float16_weights_are_stored_in_half_the_size(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        for parameter in (*model.g_a.parameters(), *model.g_s.parameters()):
            parameter.copy_(parameter.half())
    model.save_pretrained(tmp_path / "rounded")
    loaded = CMamba.from_pretrained(tmp_path / "rounded")
    assert loaded.model_id == model.model_id
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    whole, rounded = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "rounded")
    )
    saved = sum(2 * p.numel() for p in (*model.g_a.parameters(), *model.g_s.parameters()))
    # Not all of it: what fits float16 anyway, such as zeros, is short in both files.
    assert rounded < whole - 0.7 * saved


def test_the_model_of_a_file_is_found_by_its_id():
    wanted = small_model()
    assert codec.model_for(wanted.model_id, [random_model(seed=1), wanted]) is wanted
    shipped = codec.default_model()
    assert codec.model_for(shipped.model_id, [wanted]) is shipped
    with pytest.raises(ModelMismatchError) as caught:
        codec.model_for(bytes(range(1, 9)), [small_model()])
    assert "needs model 0102030405060708, which is not available" in str(caught.value)
    assert "docs/models.md" in str(caught.value)


def test_a_bundled_model_goes_where_the_given_one_is(monkeypatch):
    weights = torch.empty(1, device="meta")
    given = SimpleNamespace(model_id=bytes(8), parameters=lambda: iter([weights]))
    monkeypatch.setattr(image_codec, "loaded_model", lambda name, device: (name, device))
    assert codec.model_for(shipped_model().model_id, [given]) == ("tiny", "meta")


def test_without_a_model_the_one_that_a_file_names_decodes_it(monkeypatch):
    image, wanted = np.zeros((64, 64, 3), np.uint8), small_model()
    data = codec.encode(image, wanted)
    with pytest.raises(ModelMismatchError, match="needs model .* docs/models.md"):
        codec.decode(data)
    monkeypatch.setattr(image_codec, "name_of", {wanted.model_id: "wanted"}.get)
    loaded_model = image_codec.loaded_model
    models = {"wanted": lambda: wanted, "tiny": lambda: loaded_model("tiny")}
    monkeypatch.setattr(image_codec, "loaded_model", lambda name, *_: models[name]())
    assert np.array_equal(codec.decode(data), codec.decode(data, wanted))


def test_list_of_bundled_models_begins_with_the_current_one(root):
    listed = re.findall(
        r"^\| `([0-9a-f]{16})` \| `([\w-]+)`", (root / "docs/models.md").read_text(), re.M
    )
    assert listed[0] == (codec.default_model().model_id.hex(), codec.DEFAULT_MODEL)
    assert len({model_id for model_id, _ in listed}) == len(listed) >= 3
    for name in bundled.pretrained_names():
        assert (CMamba.from_pretrained(name).model_id.hex(), name) in listed


def test_symbols_are_checked_without_reconstruction():
    data = cmamba_ref.encode(make_image(70, 60), small_model(), 4)
    codec.check_symbols(Container.unpack(data), small_model())
    other = with_field(data, "symbols' check", 0)
    with pytest.raises(BitstreamError, match="symbols fail their check"):
        codec.check_symbols(Container.unpack(other), small_model())


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to("cpu"),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.half().to("cpu"),
    ],
    ids=["to", "half", "bfloat16", "double", "channels_last", "half-to"],
)
def test_casts_keep_model_id_and_symbols(cast):
    model = random_model()
    image = make_image(100, 130)
    with recording() as encoded:
        data = cmamba_ref.encode(image, model, 4)
    reference = cmamba_ref.decode(data, model)
    before = model.model_id
    model = cast(model)
    assert model.model_id == before
    for part in (model.h_s, model.context, model.entropy_bottleneck):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    with recording() as decoded:
        decoded_by_cast = cmamba_ref.decode(data, model)
    assert_same_coding(decoded[0], encoded[0])
    assert np.abs(decoded_by_cast.astype(int) - reference.astype(int)).mean() < 4
    with recording() as encoded:
        from_cast = cmamba_ref.encode(image, model, 4)
    with recording() as decoded:
        cmamba_ref.decode(from_cast, random_model())
    assert_same_coding(decoded[0], encoded[0])


def test_changed_weights_change_the_file():
    """Nothing derived from weights survives them: coding uses what the id names."""
    model = random_model()
    cmamba_ref.encode(make_image(64, 64), model, 4)
    for cae in model.context.cae:
        cae.head.bias.data.add_(0.3)
    data = cmamba_ref.encode(make_image(64, 64), model, 4)
    fresh = CMamba(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert fresh.model_id == model.model_id
    assert np.array_equal(cmamba_ref.decode(data, fresh), cmamba_ref.decode(data, model))


def test_update_never_alters_loaded_tables(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    loaded = CMamba.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.entropy_bottleneck.biases[0].add_(1)
    tables = {k: v.clone() for k, v in loaded.state_dict().items() if "stored" in k}
    assert len(tables) == 6
    assert loaded.update() is False
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in tables.items())
    assert loaded.update(force=True) is True
    assert not all(torch.equal(loaded.state_dict()[k], v) for k, v in tables.items())


def test_a_model_without_tables_says_what_to_do():
    with pytest.raises(WeightsError, match="update"):
        cmamba_ref.encode(make_image(8, 8), CMamba(ONE_RATE).eval())


# What is not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_images_are_refused(value):
    x = as_input(make_image(64, 64))
    x[0, 1, 30, 30] = value
    with pytest.raises(CMambaError):
        small_model().compress(x, 4)


def test_nan_in_a_weight_raises_or_has_no_effect():
    """Weights that coding does not use, such as gains of other qualities, may hold anything."""
    model = random_model()
    image = make_image(130, 130)  # z is 3x3: every tap of every kernel counts somewhere
    expected = cmamba_ref.decode(cmamba_ref.encode(image, model, 4), model)
    harmless = set()
    for name, parameter in model.named_parameters():
        element = parameter.data.view(-1)[-1:]
        before = element.clone()
        element.fill_(math.nan)
        try:
            decoded = cmamba_ref.decode(cmamba_ref.encode(image, model, 4), model)
        except CMambaError:
            pass
        else:
            assert np.array_equal(decoded, expected), name
            harmless.add(name.split(".")[0])
        element.copy_(before)
    assert harmless <= {"gain", "entropy_bottleneck"}


@pytest.mark.parametrize(
    "name",
    [
        "g_a.0.weight",
        "h_a.0.weight",
        "h_s.mean.0.weight",
        "context.cae.1.head.bias",  # its last element is a log-scale
        "context.lrp.1.layers.4.bias",  # nothing but y_bar comes after it
        "gain.log_gain",
    ],
)
def test_nan_in_the_encoder_raises(name):
    model = random_model()
    model.get_parameter(name).data.view(-1)[-1] = math.nan
    with pytest.raises(CMambaError, match="NaN"):
        cmamba_ref.encode(make_image(130, 130), model, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gain.log_gain", "entropy_bottleneck.quantiles"])
def test_non_finite_gains_and_medians_raise(name, value):
    """But for a gain of zero, the exponential of minus infinity, which is a number."""
    model = random_model()
    parameter = model.get_parameter(name)
    if name == "gain.log_gain":
        parameter.data[-1, 3] = value
    else:
        parameter.data[2, 1] = value  # the median of a channel
    if (name, value) == ("gain.log_gain", -math.inf):
        data = cmamba_ref.encode(make_image(64, 64), model, 8)
        assert cmamba_ref.decode(data, model).shape == (64, 64, 3)
    else:
        with pytest.raises(CMambaError, match="NaN"):
            cmamba_ref.encode(make_image(64, 64), model, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_inverse_gain_raises(value):
    model = random_model()
    data = cmamba_ref.encode(make_image(64, 64), model, 8)
    container = Container.unpack(data)
    model.gain.log_inverse_gain.data[-1, 3] = value
    with pytest.raises(BitstreamError, match="not finite"):
        model.decompress([[container.y], [container.z]], (1, 1))


def test_nan_scale_raises_when_decoding():
    model = random_model()
    out = model.compress(as_input(make_image(64, 64)), 4)
    model.context.cae[1].head.bias.data[-1] = math.nan
    with pytest.raises(BitstreamError, match="not finite"):
        model.decompress(out["strings"], out["shape"])


def test_tables_refuse_nan():
    model = random_model()
    with torch.no_grad():
        model.entropy_bottleneck.quantiles[0, 1] = math.nan
    with pytest.raises(CMambaError):
        model.update(force=True)


def test_a_model_loaded_in_inference_mode_codes(tmp_path):
    random_model().save_pretrained(tmp_path)
    image = make_image(64, 64)
    with torch.inference_mode():
        model = CMamba.from_pretrained(tmp_path)
        data = cmamba_ref.encode(image, model, 3)
    assert np.array_equal(cmamba_ref.decode(data, model), cmamba_ref.decode(data, random_model()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_cast_model_is_the_same_model(copied):
    model = random_model().half()
    data = cmamba_ref.encode(make_image(64, 64), model, 3)
    same = copied(model)
    assert same.model_id == random_model().model_id
    cmamba_ref.decode(data, same)
    with torch.no_grad():
        next(same.parameters()).add_(1)
    assert same.model_id != model.model_id


def test_a_model_that_was_cast_and_cast_back_is_not_saved(tmp_path):
    with pytest.raises(WeightsError, match="cast back"):
        random_model().half().float().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    random_model().double().float().save_pretrained(tmp_path)  # nothing was lost


def test_cast_models_are_not_saved(tmp_path):
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(WeightsError, match="float32"):
            random_model().to(cast).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_does_not_shadow_a_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "PRETRAINED", tmp_path / "package")
    random_model(seed=1).save_pretrained(tmp_path / "package" / "tiny")
    random_model(seed=2).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert CMamba.from_pretrained("tiny").model_id == random_model(seed=1).model_id
    for folder in ("./tiny", Path("tiny"), Path("./tiny")):
        assert CMamba.from_pretrained(folder).model_id == random_model(seed=2).model_id
        assert image_codec.loaded_model(folder).model_id == random_model(seed=2).model_id


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loading_does_not_depend_on_the_default_dtype(tmp_path, dtype):
    random_model().save_pretrained(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        model = CMamba.from_pretrained(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.model_id == random_model().model_id


def test_the_shortest_streams_pass_the_check_of_lengths():
    """rANS may undercut the information of a skewed table; the bound on lengths allows for it."""
    for frequency in (40_000, 60_000, 65_000):
        cdf = np.array([0, frequency, 65_535, 65_536], np.int32)
        tables = CdfTables(cdf, np.array([0, 4], np.int32), np.array([0], np.int32))
        zeros = np.zeros(300_000, np.int32)
        string = rans.encode(tables, [(zeros, zeros)], lanes=1)
        bits = rans.ideal_bits(tables, zeros, zeros)
        assert len(string) > RANS_SLACK * bits / 8
