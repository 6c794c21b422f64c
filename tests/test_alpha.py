"""The alpha channel through a file: without loss, and hidden colours cost nothing."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from codec_helpers import (
    PNG_SIGNATURE,
    join_chunks,
    make_image,
    png_chunk,
    random_model,
    split_chunks,
    with_field,
)
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


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 70, 50, 8, 0, 0, 0, 0))
ROWS = b"".join(b"\0" + row.tobytes() for row in ALPHA)
END = (b"IEND", b"")


def test_alpha_of_another_form_is_refused():
    good = png(HEADER, (b"IDAT", zlib.compress(ROWS)), END)
    for data in (good, pack_alpha(ALPHA)):
        np.testing.assert_array_equal(unpack_alpha(data, 50, 70), ALPHA)
    two = zlib.compress(ROWS)[:99], zlib.compress(ROWS)[99:]
    split = png(HEADER, *((b"IDAT", part) for part in two), END)
    np.testing.assert_array_equal(unpack_alpha(split, 50, 70), ALPHA)

    deep, colour = io.BytesIO(), io.BytesIO()
    Image.fromarray(ALPHA.astype(np.uint16)).save(deep, "PNG")
    Image.fromarray(make_image(50, 70)).save(colour, "PNG")
    pixels, bad_filter = (b"IDAT", zlib.compress(ROWS)), b"\5" + ROWS[1:]
    for data, reason in (
        (b"", "must be a PNG"),
        (deep.getvalue(), "8 bits of grey"),
        (colour.getvalue(), "8 bits of grey"),
        (pack_alpha(ALPHA.T), "of 70x50 pixels"),
        (png((b"IHDR", HEADER[1] + b"more"), pixels, END), "of 70x50 pixels"),
        (png(HEADER, pixels, (b"IEND", b"more")), "of 70x50 pixels"),
        (png(HEADER, pixels, (b"tEXt", b"abcd"), END), "of the chunks IHDR, IDAT and IEND"),
        (png(HEADER, pixels), "of the chunks IHDR, IDAT and IEND"),
        (png(HEADER), "of the chunks IHDR, IDAT and IEND"),
        (png(), "of the chunks IHDR, IDAT and IEND"),
        (png(HEADER, END), "damaged: its PNG must hold its rows"),
        (good + b"\0", "a checksum of its PNG is wrong"),
        (good[:-1], "a checksum of its PNG is wrong"),
        (good[:50] + bytes([good[50] ^ 1]) + good[51:], "a checksum of its PNG is wrong"),
        (png(HEADER, (b"IDAT", b"noise"), END), "alpha channel is damaged"),
        (png(HEADER, (b"IDAT", zlib.compress(ROWS)[:-1]), END), "must hold its rows, no more"),
        (png(HEADER, (b"IDAT", zlib.compress(ROWS) + b"1"), END), "must hold its rows, no more"),
        (png(HEADER, (b"IDAT", zlib.compress(ROWS[:-1])), END), "must hold its rows, no more"),
        (png(HEADER, (b"IDAT", zlib.compress(ROWS + b"1")), END), "must hold its rows, no more"),
        (png(HEADER, (b"IDAT", zlib.compress(bad_filter)), END), "must hold its rows, no more"),
    ):
        with pytest.raises(BitstreamError, match=reason):
            unpack_alpha(data, 50, 70)


def test_what_expands_too_far_is_refused_without_memory(model):
    """Many more rows than declared; and many rows that header and alpha both declare."""
    bomb = png(HEADER, (b"IDAT", zlib.compress(bytes(200_000_000), 9)), END)
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="must hold its rows, no more"):
        unpack_alpha(bomb, 50, 70)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()

    image = np.dstack([make_image(50, 70), ALPHA])
    huge = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 0, 0, 0, 0)
    alpha = png((b"IHDR", huge), (b"IDAT", zlib.compress(b"")), END)
    data = with_field(with_field(cmamba_ref.encode(image, model), "width", 9_000), "height", 9_000)
    chunks = [(kind, alpha if kind == b"ALPH" else content) for kind, content in split_chunks(data)]
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="cannot hold an image of"):
        cmamba_ref.decode(join_chunks(chunks), model)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
