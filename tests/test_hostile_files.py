"""Files and weights, damaged or made to do harm: an error with its reason, or an image."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_helpers import (
    HEADER,
    LATENT_PREFIX,
    ONE_RATE,
    field_of,
    join_chunks,
    join_image,
    make_image,
    random_model,
    shipped_model,
    split_chunks,
    split_image,
    with_field,
)
from safetensors.torch import load_file, save_file

import cmamba_ref
from cmamba_ref import BitstreamError, CMamba, WeightsError
from cmamba_ref.codec import DEFAULT_MAX_PIXELS
from cmamba_ref.entropy.tables import gaussian_tables


@functools.cache
def small_model() -> CMamba:
    return random_model()


@functools.cache
def small_file(height: int = 50, width: int = 70, quality: float = 4, seed: int = 0) -> bytes:
    return cmamba_ref.encode(make_image(height, width, seed), small_model(), quality)


def decode(data: bytes) -> np.ndarray:
    return cmamba_ref.decode(data, small_model())


# Damage that the checksum finds.


def test_a_file_truncated_anywhere_is_refused():
    """Also its first chunk, with right checksums."""
    data = small_file()
    for length in range(len(data)):
        with pytest.raises(BitstreamError, match="truncated|does not begin"):
            decode(data[:length])
    ((kind, content),) = split_chunks(data)
    for length in range(len(content)):
        with pytest.raises(BitstreamError):
            decode(join_chunks([(kind, content[:length])]))


def test_a_flipped_bit_anywhere_is_refused():
    data = small_file()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            decode(bytes(changed))


def test_bytes_appended_or_put_before_are_refused():
    for data in (small_file() + b"\0", b"\0" + small_file(), b"", b"\x8f", bytes(100)):
        with pytest.raises(BitstreamError):
            decode(data)


# Fields changed on purpose, the checksum made right.


def test_another_model_s_file_names_both_models():
    other = random_model(seed=1)
    with pytest.raises(BitstreamError) as error:
        cmamba_ref.decode(small_file(), other)
    for model in (small_model(), other):
        assert model.model_id.hex() in str(error.value)


@pytest.mark.parametrize("version", [2, 3, 255])
def test_a_newer_version_is_refused_by_number_before_anything_else_is_believed(version):
    data = bytearray(small_file())
    data[4] = version
    repaired = join_chunks(split_chunks(data), start=bytes(data[:5]))
    for changed in (bytes(data), repaired, bytes(data[:20])):
        with pytest.raises(BitstreamError, match=f"version {version}, this program reads"):
            decode(changed)


FIELDS = [
    ("flags", 2, "declares an alpha channel, and it holds none"),
    ("flags", 4, "malformed"),
    ("flags", 128, "malformed"),
    ("model id", b"12345678", "made by model 3132333435363738"),
    ("width", 0, "malformed"),
    ("height", 0, "malformed"),
    ("width", 2**32 - 1, "limit"),
    ("height", 2**32 - 1, "limit"),
    ("width", 65, None),
    ("width", 129, "entropy-coded|cannot hold|check"),
    ("height", 65, "entropy-coded|cannot hold|check"),
    ("z length", 0, "string|quality"),
    ("z length", 2**32 - 1, "malformed"),
    ("skipped", 65, "malformed: 65 skipped tables"),
    ("skipped", 64, "entropy-coded|check|left over|states"),
    ("quality", 0, "quality 0.0 is out of range"),
    ("quality", 99, "quality 0.99 is out of range"),
    ("quality", 801, "quality 8.01 is out of range"),
    ("quality", 65535, "is out of range"),
    ("symbols' check", 12345, "fail their check"),
]


def test_every_field_is_tried():
    separately = {"shift"}
    assert {field for field, *_ in FIELDS} | separately == {*HEADER, *LATENT_PREFIX, "z length"}


@pytest.mark.parametrize(("field", "value", "reason"), FIELDS)
def test_a_changed_field_is_an_error_or_an_image_of_the_declared_size(field, value, reason):
    changed = with_field(small_file(), field, value)
    if reason is None:
        shape = (field_of(changed, "height"), field_of(changed, "width"), 3)
        assert decode(changed).shape == shape
    else:
        with pytest.raises(BitstreamError, match=reason):
            decode(changed)


def test_a_changed_shift_is_an_error_or_the_same_image():
    """A shift moves boundaries a little: where no scale lies between, the symbols are the same."""
    data = small_file(130, 250)
    expected, outcomes = decode(data), {}
    for shift in (0, 1, 2, 16, 64, 255):
        try:
            outcomes[shift] = np.array_equal(decode(with_field(data, "shift", shift)), expected)
        except BitstreamError:
            outcomes[shift] = None
    assert outcomes[0] is True and outcomes[255] is None and False not in outcomes.values()


def test_grey_is_a_flag_and_costs_nothing():
    changed = with_field(small_file(), "flags", 1)
    assert np.array_equal(decode(changed), np.rint(decode(small_file()).mean(axis=2)))


def test_quality_is_guarded_by_the_file_s_checksum_alone():
    """As docs/format.md says: every symbol is right with another quality, only the gain is not."""
    changed = with_field(small_file(), "quality", 450)
    assert not np.array_equal(decode(changed), decode(small_file()))
    with pytest.raises(BitstreamError, match="checksum"):
        decode(changed[:-20] + small_file()[-20:])


def test_strings_of_two_files_do_not_mix():
    one, two = (split_image(split_chunks(small_file(seed=k))[0][1]) for k in (0, 1))
    fields, z, y = one
    assert decode(join_chunks([(b"IMAG", join_image(fields, z, y))])).shape == (50, 70, 3)
    assert two[1] != z
    with pytest.raises(BitstreamError):
        decode(join_chunks([(b"IMAG", join_image(fields, two[1], y))]))


def test_sizes_that_the_payload_cannot_hold_are_refused_at_once():
    for width, height in ((9_900, 9_900), (1, 1_500_000), (1_500_000, 1)):
        data = with_field(with_field(small_file(), "width", width), "height", height)
        start = time.perf_counter()
        with pytest.raises(BitstreamError, match="cannot hold an image of"):
            decode(data)
        assert time.perf_counter() - start < 2


def test_a_thin_image_counts_as_what_it_is_padded_to():
    data = with_field(with_field(small_file(), "width", 1), "height", DEFAULT_MAX_PIXELS // 64 + 1)
    with pytest.raises(BitstreamError, match="limit"):
        decode(data)


def test_the_strings_of_compressai_s_protocol_are_checked_too():
    model = small_model()
    out = model.compress(torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0)), 4)
    (y,), (z,) = out["strings"]
    for strings, shape in (
        ([[y], [z]], (1, 2)),
        ([[y], [z]], (30_000, 30_000)),
        ([[z], [y]], (1, 1)),
        ([[y], []], (1, 1)),
        ([[], []], (1, 1)),
        ([[y[:7]], [z]], (1, 1)),
        ([[b""], [b""]], (1, 1)),
        ([[y + b"\0\0"], [z]], (1, 1)),
        ([[y], [z + b"\0\0"]], (1, 1)),
    ):
        with pytest.raises(BitstreamError):
            model.decompress(strings, shape)


def test_a_model_of_one_rate_takes_no_quality():
    model = random_model(ONE_RATE)
    data = cmamba_ref.encode(make_image(30, 30), model)
    with pytest.raises(BitstreamError, match="quality 4.0 is out of range"):
        cmamba_ref.decode(with_field(data, "quality", 400), model)


# Weights.


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model on disk, without the hash that would refuse most of what these tests do to it."""
    small_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.sha256").unlink()
    return tmp_path / "model"


def rewrite(saved: Path, **changes: Callable) -> None:
    """Replace tensors by functions of them, or take them out where these give None."""
    tensors = load_file(saved / "model.safetensors")
    for name, change in changes.items():
        changed = change(tensors.pop(name, None))
        if changed is not None:
            tensors[name] = changed.contiguous()
    save_file(tensors, saved / "model.safetensors")


def put(index: int, value: float) -> Callable:
    """The change of one element."""

    def change(tensor):
        tensor.view(-1)[index] = value
        return tensor

    return change


def refused(saved: Path, match: str | None = None) -> None:
    start = time.perf_counter()
    with pytest.raises(WeightsError, match=match):
        CMamba.from_pretrained(saved)
    assert time.perf_counter() - start < 5


def test_truncated_weights_are_refused(saved):
    data = (saved / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 100, 5000, len(data) // 2, len(data) - 1):
        (saved / "model.safetensors").write_bytes(data[:length])
        refused(saved, "cannot read")


def test_a_pickle_is_no_weights_file(saved):
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    refused(saved, "cannot read")


Y_TABLES, Z_TABLES = "gaussian_conditional.stored.", "entropy_bottleneck.stored."
ONE_TABLE_LESS = {
    f"{Y_TABLES}{name}": lambda _, name=name: torch.from_numpy(
        getattr(gaussian_tables([0.11] * 63), name)
    )
    for name in ("cdf", "starts", "offsets")
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context.cae.0.w_sq.weight": torch.t}, "context.cae.0.w_sq.weight is"),
        ({"g_a.0.weight": torch.Tensor.bfloat16}, "g_a.0.weight is torch.bfloat16"),
        ({"h_s.mean.0.weight": lambda _: None}, "h_s.mean.0.weight"),
        ({"g_a.99.weight": lambda _: torch.zeros(1)}, "no such tensor"),
        ({f"{Y_TABLES}cdf": put(-2, 0)}, "not strictly increasing"),
        ({f"{Z_TABLES}cdf": lambda t: t[:-1]}, "starts"),
        ({f"{Y_TABLES}cdf": lambda t: t[:1] * 0}, "`starts` must run from 0 to 1"),
        ({f"{Y_TABLES}starts": put(3, 2**31 - 1)}, "tables"),
        (ONE_TABLE_LESS, "64 tables, got 63"),
        ({f"{Y_TABLES}offsets": lambda t: t[None]}, "one-dimensional"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, changes, reason):
    CMamba.from_pretrained(saved)
    rewrite(saved, **changes)
    refused(saved, reason)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(saved, value):
    """One tensor of every part of the model, the gains and the quantiles among them."""
    names = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        if tensor.is_floating_point():
            names[name.split(".")[0] + name.split(".")[-1]] = name
    assert {"gain.log_inverse_gain", "entropy_bottleneck.quantiles"} < set(names.values())
    sound = (saved / "model.safetensors").read_bytes()
    for name in names.values():
        rewrite(saved, **{name: put(-1, value)})
        refused(saved, f"{name} holds NaN or infinity")
        (saved / "model.safetensors").write_bytes(sound)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [65536, 65536, 65536]},
        {"latent_channels": 65536, "slices": 65536},
        {"depths": [1024, 1024, 1024]},
        {"d_state": 65536},
        {"slices": 10**30},
        {"slices": [1] * 15},
        {"slices": [8, 8.0]},
        {"slices": []},
        {"context": []},
        {"latent_channels": -16},
        {"ssm_ratio": 1e-9},
        {"ssm_ratio": float("nan")},
        {"ssm_ratio": "2"},
        {"lmbdas": ["a", "b"]},
        {"lmbdas": None},
        {"lmbdas": [0.01] * 100_000},
        {"widths": "abc"},
        {"unheard_of": 1},
        {"name": None},
    ],
    ids=str,
)
def test_absurd_configurations_are_refused_quickly(saved, change):
    values = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(json.dumps(values))
    refused(saved)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"widths": ' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "utf-16", "deep", "long-number"],
)
def test_a_text_that_is_no_configuration_is_refused_quickly(saved, text):
    (saved / "config.json").write_bytes(text)
    refused(saved)


def test_a_directory_without_a_model_says_what_to_give(tmp_path):
    with pytest.raises(WeightsError, match="no config.json"):
        CMamba.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="save_pretrained"):
        CMamba.from_pretrained("no-such-model")


def test_the_bundled_model_refuses_a_file_of_another_model():
    with pytest.raises(BitstreamError, match=f"'tiny' {shipped_model().model_id.hex()}"):
        cmamba_ref.decode(small_file(), shipped_model())
