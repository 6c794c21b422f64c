"""Pictures inside a page: as lossless PNG in data URIs, whole or as the largest part that fits."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """What a picture `[H, W, ...]` has in there."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]


def embed(pictures: Sequence[np.ndarray], place: Window, most: int) -> tuple[Window, list[str]]:
    """Pictures of one shape as data URIs of together at most `most` characters.

    Returns:
        The window that is embedded, the same for all: the whole where that fits, otherwise a part
        of the same proportions with `place` in its middle, as far as the edges allow.  And the
        URIs.  A window of one pixel is embedded whatever it takes.
    """
    height, width = pictures[0].shape[:2]
    part = 1.0
    while True:
        size = max(1, int(part * width)), max(1, int(part * height))
        window = _around(place, *size, width, height)
        uris = [data_uri(png(window.of(picture))) for picture in pictures]
        length = sum(map(len, uris))
        if length <= most or size == (1, 1):
            return window, uris
        # Bytes go with the area; a little less, or a last per cent may take many turns.
        part *= min(0.95, math.sqrt(most / length))


def _around(place: Window, width: int, height: int, all_width: int, all_height: int) -> Window:
    """A window of this size inside the whole, its middle as near to that of `place` as can be."""
    left = place.left + (place.width - width) // 2
    top = place.top + (place.height - height) // 2
    return Window(
        min(max(left, 0), all_width - width), min(max(top, 0), all_height - height), width, height
    )


def most_detailed(picture: np.ndarray, side: int) -> Window:
    """The square whose neighbouring pixels differ most; of the original alone, so no codec's pick.

    Args:
        picture: uint8 `[H, W, 3]`.
        side: in pixels; less where the picture is smaller.
    """
    grey = picture.astype(np.float64).mean(axis=-1)
    activity = np.zeros_like(grey)
    activity[1:] += np.abs(np.diff(grey, axis=0))
    activity[:, 1:] += np.abs(np.diff(grey, axis=1))
    height, width = (min(side, length) for length in grey.shape)
    # The sum over any rectangle from the four corners of the running sums.
    sums = np.pad(activity, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    inside = (sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width]) + sums[
        :-height, :-width
    ]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return Window(int(left), int(top), width, height)


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture as a PNG file, as small as Pillow makes it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file inside an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
