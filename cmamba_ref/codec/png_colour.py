"""Colour spaces that PNG files declare by the chunks cICP, gAMA and cHRM, as ICC profiles.

Precedence is that of the PNG specification, third edition: cICP, iCCP, sRGB, then gAMA and cHRM.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from cmamba_ref.errors import ImageError

# x and y of white, red, green and blue, in the order of cHRM, by the code of ITU-T H.273.
D65 = (0.3127, 0.3290)
PRIMARIES = {
    1: (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
# g, a, b, c, d of ICC's parametric curve: (a x + b)^g from x = d on, c x below.
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
CURVES = {
    **dict.fromkeys((1, 6, 14, 15), _BT709_CURVE),
    4: (2.2, 1, 0, 0, 0),
    5: (2.8, 1, 0, 0, 0),
    8: (1, 1, 0, 0, 0),
    13: SRGB_CURVE,
}
HDR = {(16,): "PQ", (18,): "HLG"}

# gAMA within 5 % of 1/2.2 means sRGB's curve, as in libpng; it is how files of sRGB declare that.
_GAMMA_TOLERANCE = 0.05
_XY_TOLERANCE = 0.001

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def read_cicp(file: BinaryIO) -> tuple[int, ...] | None:
    """Return the bytes of the chunk cICP of a PNG file, which Pillow leaves out, if there is one.

    They are the codes of primaries, transfer and matrix in ITU-T H.273, and 1 for the full range.
    """
    position = file.tell()
    file.seek(8)
    found = None
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"cICP":
            found = tuple(file.read(length))
        else:
            file.seek(length, os.SEEK_CUR)
        file.seek(4, os.SEEK_CUR)
    file.seek(position)
    return found


def refuse_hdr(info: dict[Any, Any]) -> None:
    """Refuse PQ and HLG, which mean more light than 8 bits of sRGB hold.

    Raises:
        ImageError: the text continues the image's name.
    """
    transfer = HDR.get(info.get("cicp", ())[1:2])
    if transfer:
        raise ImageError(f"has HDR colours ({transfer}); convert it to sRGB first", "HDR colours")


def declared_profile(info: dict[Any, Any], grey: bool) -> bytes | None:
    """Return the ICC profile that an image has, or one for what its PNG chunks declare.

    Args:
        info: that of Pillow's image; under "cicp" what `read_cicp` returned.
        grey: whether the profile is for a grey image.

    Returns:
        None for sRGB, declared or not.

    Raises:
        ImageError: chunks of unknown or no meaning. The text continues the image's name.
    """
    cicp, gamma = info.get("cicp"), info.get("gamma")
    if cicp is not None:
        name, found = "cICP", f"{cicp}"
        # Other matrices are for luma and colour differences, another range is a narrow one.
        known = len(cicp) == 4 and cicp[2:] == (0, 1)
        primaries = PRIMARIES.get(cicp[0]) if known else None
        curve = CURVES.get(cicp[1]) if known else None
    elif info.get("icc_profile") or "srgb" in info:
        return info.get("icc_profile")
    else:
        name, found = "gAMA or cHRM", f"{gamma}, {info.get('chromaticity')}"
        primaries = info.get("chromaticity", PRIMARIES[1])
        is_srgb = gamma is None or abs(gamma * 2.2 - 1) <= _GAMMA_TOLERANCE
        curve = SRGB_CURVE if is_srgb else (1 / gamma, 1, 0, 0, 0) if gamma else None
    try:
        if primaries is None or curve is None:
            raise ValueError
        is_srgb_space = grey or np.allclose(primaries, PRIMARIES[1], rtol=0, atol=_XY_TOLERANCE)
        if is_srgb_space and curve == SRGB_CURVE:
            return None
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            return _profile(primaries, curve, grey)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError, struct.error) as error:
        reason = f"{name} chunk that cannot be applied"
        raise ImageError(f"has a {reason} ({found}); convert it to sRGB first", reason) from error


def _profile(primaries: Sequence[float], curve: Sequence[float], grey: bool) -> bytes:
    """Return an ICC profile, version 4, of a display with these primaries and this curve."""
    text = "Colours of a PNG file".encode("utf-16-be")
    text = b"mluc" + struct.pack(">III4sII", 0, 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": text, b"cprt": text, b"wtpt": _xyz(_D50)}
    trc = b"para" + struct.pack(">IHH", 0, 3, 0) + _fixed(curve)
    if grey:
        tags[b"kTRC"] = trc
    else:
        xy = np.reshape(primaries, (4, 2))
        white, *to_xyz = np.column_stack([xy, 1 - xy.sum(axis=1)])
        white, to_xyz = white / white[1], np.transpose(to_xyz)
        to_xyz = to_xyz * np.linalg.solve(to_xyz, white)
        cones = (_BRADFORD @ _D50) / (_BRADFORD @ white)
        to_d50 = np.linalg.solve(_BRADFORD, cones[:, None] * _BRADFORD)
        tags[b"chad"] = b"sf32" + bytes(4) + _fixed(to_d50.ravel())
        for name, column in zip("rgb", (to_d50 @ to_xyz).T, strict=True):
            tags[f"{name}XYZ".encode()] = _xyz(column)
            tags[f"{name}TRC".encode()] = trc
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if grey else b"RGB "
    head = struct.pack(">I4xI", 128 + len(table) + len(body), 0x04300000)
    head += b"mntr" + space + b"XYZ " + struct.pack(">6H", 2025, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + _fixed(_D50)
    return head.ljust(128, b"\0") + table + body


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _fixed(values: Sequence[float] | np.ndarray) -> bytes:
    """Return ICC's s15Fixed16 numbers."""
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))
