"""The alpha channel through a file: without loss, and hidden colours cost nothing."""

import io
import struct
import zlib

import numpy as np
import pytest
from codec_helpers import join_chunks, make_image, random_model, split_chunks
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import cmamba_ref
from cmamba_ref import BitstreamError, CMamba
from cmamba_ref.codec.alpha import fill_hidden, pack_alpha, unpack_alpha

ALPHA = np.random.default_rng(0).integers(0, 256, (50, 70)).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> CMamba:
    return random_model()


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("kind", ["noise", "opaque", "hidden", "edge"])
def test_alpha_comes_back_exactly(model, grey, kind):
    colours = make_image(50, 70)
    alpha = {
        "noise": ALPHA,
        "opaque": np.full_like(ALPHA, 255),
        "hidden": np.zeros_like(ALPHA),
        "edge": np.where(np.arange(70) < 30, 0, 255).astype(np.uint8) * np.ones_like(ALPHA),
    }[kind]
    image = np.dstack([colours[..., 0] if grey else colours, alpha])
    decoded = cmamba_ref.decode(cmamba_ref.encode(image, model), model)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded[..., -1], alpha)
    if kind == "opaque":
        plain = cmamba_ref.encode(image[..., 0] if grey else colours, model)
        expected = cmamba_ref.decode(plain, model)
        np.testing.assert_array_equal(decoded[..., :-1].reshape(expected.shape), expected)


def test_hidden_colours_cost_nothing(model):
    image = np.dstack([make_image(128, 128), np.full((128, 128), 255, np.uint8)])
    image[:, 50:, 3] = 0
    noisy = image.copy()
    noisy[:, 50:, :3] = np.random.default_rng(1).integers(0, 256, (128, 78, 3))
    assert cmamba_ref.encode(noisy, model) == cmamba_ref.encode(image, model)


def test_visible_colours_are_coded_as_without_alpha():
    image, alpha = make_image(60, 80), np.full((60, 80), 255, np.uint8)
    assert fill_hidden(image, alpha) is image
    alpha[:, 30:] = 0
    alpha[3, 50] = 1
    filled = fill_hidden(image, alpha)
    np.testing.assert_array_equal(filled[alpha > 0], image[alpha > 0])
    assert filled.shape == image.shape and filled.dtype == np.uint8
    grey = fill_hidden(image[..., 0], alpha)
    np.testing.assert_array_equal(grey, filled[..., 0])


@given(
    arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))),
    st.integers(0, 255),
)
def test_a_colour_continues_over_what_is_hidden(alpha, level):
    """Whatever is hidden: a plain image stays plain, if any of it is seen."""
    image = np.where(alpha[..., None] == 0, 77, level).astype(np.uint8) * np.ones(3, np.uint8)
    expected = level if alpha.any() else 0
    assert (fill_hidden(image, alpha) == expected).all()


def test_the_fill_is_smooth():
    """Between two visible columns it goes from the one colour to the other."""
    alpha = np.zeros((16, 64), np.uint8)
    alpha[:, [0, 63]] = 255
    image = np.zeros((16, 64, 3), np.uint8)
    image[:, 63] = 200
    row = fill_hidden(image, alpha)[8, :, 0].astype(int)
    assert row[5] < 70 and row[58] > 130 and np.abs(np.diff(row[1:-1])).max() < 40


# What else may be in the place of the PNG.


def test_alpha_of_another_form_is_refused():
    good = pack_alpha(ALPHA)
    np.testing.assert_array_equal(unpack_alpha(good, 50, 70), ALPHA)
    end, pixels = good.index(b"IEND") - 4, good.index(b"IDAT") - 4
    text = struct.pack(">I", 4) + b"tEXtabcd" + struct.pack(">I", zlib.crc32(b"tEXtabcd"))
    flipped = bytearray(good)
    flipped[pixels + 30] ^= 1
    deep, colour = io.BytesIO(), io.BytesIO()
    Image.fromarray(ALPHA.astype(np.uint16)).save(deep, "PNG")
    Image.fromarray(make_image(50, 70)).save(colour, "PNG")
    for data, reason in (
        (b"", "must be a PNG of 70x50 pixels"),
        (deep.getvalue(), "8 bits of grey"),
        (colour.getvalue(), "8 bits of grey"),
        (pack_alpha(ALPHA.T), "of 70x50 pixels"),
        (good[:end] + text + good[end:], "of the chunks IHDR, IDAT and IEND"),
        (good[:end], "of the chunks IHDR, IDAT and IEND"),
        (good + b"\0", "of the chunks IHDR, IDAT and IEND"),
        (bytes(flipped), "alpha channel is damaged"),
    ):
        with pytest.raises(BitstreamError, match=reason):
            unpack_alpha(data, 50, 70)


def test_bombs_take_no_memory(model):
    """Many more pixels than declared behind a right header; and a size that nothing stands for."""
    header = pack_alpha(ALPHA)[:33]
    zeros = zlib.compress(bytes(50_000_000), 9)
    parts = [(b"IDAT", zeros), (b"IEND", b"")]
    png = header + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    assert (unpack_alpha(png, 50, 70) == 0).all()  # the first rows, as every PNG reader
    image = np.dstack([make_image(50, 70), ALPHA])
    (_, content), _ = split_chunks(cmamba_ref.encode(image, model))
    huge = struct.pack(">II", 9_000, 9_000)
    wide = png[:16] + huge + png[24:]
    with pytest.raises(BitstreamError, match="must be a PNG of 70x50 pixels"):
        cmamba_ref.decode(join_chunks([(b"IMAG", content), (b"ALPH", wide)]), model)
