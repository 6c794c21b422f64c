"""Synthetic graphics to train on: text, flat shapes, lines, patterns, charts and windows.

A model that is trained on natural images alone blurs text and returns pure colours as brown. Each
graphic is a function of a generator, so a run that is resumed draws the same ones.

`python -m cmamba_ref.training.graphics FOLDER` writes ten graphics that no training run draws, to
measure a model on.
"""

from __future__ import annotations

import argparse
import functools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmamba_ref.training import draws

T = TypeVar("T")
Colour = tuple[int, int, int]


class Font(NamedTuple):
    """A font file (None: Pillow's own), a size in pixels, and "L" or "1": smooth or sharp edges."""

    path: str | None
    size: int
    mode: str


# Share of graphics that are one colour, and of those drawn at twice the size and then reduced,
# which smooths their edges.
SOLID, SMOOTHED = 0.04, 0.3
# Panels shorter than this are not divided further.
DIVISIBLE = 96

CORNERS: tuple[Colour, ...] = (
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)),
    *((0, 0, 0), (255, 255, 255)),
)
BLACK, WHITE = CORNERS[-2:]

# Thresholds of a 4x4 ordered dither.
BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])

TEXT = (
    "the of and to in is that for with as on by at from this it are or an be file edit view help "
    "open save close cancel name size date price total rate image model channel scan state frame "
    "window search quick brown fox jumps over lazy dog Zurich Berlin Tokyo Paris Lima Oslo Quito "
    "(x) {y} [0] a+b i++ != => == && /usr/bin www. @home #12 50% $9.99 3.14 1024 2048 0x7f v1.2 "
    "return class import while const void int: True None self. MONDAY JULY OK YES NO STOP EXIT NEW"
)
WORDS = TEXT.split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-+*/=()[]<>%&"

# Sizes of fonts in pixels: few enough that their letters can be kept.
SIZES = (7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 32, 48, 72)
# Fonts that matplotlib ships with the letters above; the others hold symbols.
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmmi10", "cmr10", "cmss10", "cmt")


def draw(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random graphic, uint8 `[size, size, 3]`.

    It is the same for the same generator, and the same fonts: those of matplotlib, if installed.
    """
    if rng.random() < SOLID:
        return np.full((size, size, 3), _colour(rng), dtype=np.uint8)
    factor = 2 if rng.random() < SMOOTHED else 1
    image = Image.new("RGB", (size * factor, size * factor), _colour(rng))
    _fill(rng, image, (0, 0, *image.size), depth=int(rng.integers(4)))
    while rng.random() < 0.3:
        _pick(rng, OVERLAYS)(rng, image)
    return np.asarray(image.reduce(factor) if factor > 1 else image).copy()


def _fill(rng: np.random.Generator, image: Image.Image, box: tuple[int, ...], depth: int) -> None:
    """Draw one panel in a box, or divide the box in two."""
    low, high = list(box[:2]), list(box[2:])
    sides = high[0] - low[0], high[1] - low[1]
    if depth == 0 or max(sides) < DIVISIBLE:
        panel = Image.new("RGB", sides, _colour(rng))
        _pick(rng, PANELS)(rng, panel)
        image.paste(panel, (low[0], low[1]))
        return
    axis = int(sides[1] > sides[0])
    first_end, second_start = high.copy(), low.copy()
    first_end[axis] = second_start[axis] = low[axis] + int(sides[axis] * rng.uniform(0.25, 0.75))
    _fill(rng, image, (*low, *first_end), depth - 1)
    _fill(rng, image, (*second_start, *high), depth - 1)


# ---------------------------------------------------------------- random choices


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _colour(rng: np.random.Generator) -> Colour:
    """Return a corner of the RGB cube in half of all cases, else another saturated, grey or any."""
    kind = rng.random()
    if kind < 0.5:
        return _pick(rng, CORNERS)
    if kind < 0.7:
        channels = [int(rng.integers(0, 50)), int(rng.integers(256)), int(rng.integers(206, 256))]
        red, green, blue = rng.permutation(channels).tolist()
        return red, green, blue
    if kind < 0.85:
        level = int(rng.integers(256))
        return level, level, level
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _pair(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Return background and ink that differ visibly; black and white in half of all cases."""
    kind = rng.random()
    if kind < 0.3:
        return WHITE, BLACK
    if kind < 0.5:
        return BLACK, WHITE
    ground, ink = _colour(rng), _colour(rng)
    while max(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 64:
        ink = _colour(rng)
    return ground, ink


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _points(rng: np.random.Generator, image: Image.Image, count: int) -> list[tuple[float, float]]:
    """Return points in the image and a little beyond its edges."""
    spread = rng.uniform(-0.1, 1.1, (count, 2)) * image.size
    return [(x, y) for x, y in spread.tolist()]


def _box(rng: np.random.Generator, image: Image.Image) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a box of at least 5 pixels a side."""
    ends = np.sort(rng.uniform(-0.1, 1.1, (2, 2)), axis=0) * image.size
    (left, top), (right, bottom) = ends.astype(int).tolist()
    return left, top, right + 5, bottom + 5


# ---------------------------------------------------------------- text


@functools.cache
def _font_files() -> tuple[str | None, ...]:
    """Return the fonts that matplotlib ships; without it Pillow's own, as None."""
    try:
        import matplotlib
    except ImportError:
        return (None,)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(p for p in folder.glob("*.ttf") if p.name.startswith(FONTS))
    return tuple(str(path) for path in paths if "Display" not in path.name)


def _font(rng: np.random.Generator, low: float, high: float) -> Font:
    size = _pick(rng, [size for size in SIZES if low <= size <= high])
    sharp = size <= 16 and rng.random() < 0.3
    return Font(_pick(rng, _font_files()), size, "1" if sharp else "L")


# FreeType's faces must not be used by two threads at once.
_face_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def _face(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    if path is None:
        return ImageFont.load_default(size)  # pyright: ignore[reportReturnType]
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


# To draw a letter takes ten times as long as to copy it.
@functools.lru_cache(maxsize=50_000)
def _glyph(font: Font, letter: str) -> tuple[np.ndarray, int, int]:
    """Return a letter's coverage, uint8 `[H, W]`, its offset to the right and its advance."""
    with _face_lock:
        face = _face(font.path, font.size)
        left, _, right, _ = face.getbbox(letter, font.mode)
        left, right = math.floor(left), math.ceil(right)
        cell = Image.new("L", (max(1, right - left), sum(face.getmetrics())))
        pen = ImageDraw.Draw(cell)
        pen.fontmode = font.mode
        pen.text((-left, 0), letter, fill=255, font=face)
        return np.asarray(cell), left, round(face.getlength(letter, font.mode))


def _write(
    image: Image.Image, place: tuple[float, float], text: str, ink: Colour, font: Font
) -> None:
    """Write one line whose upper left corner is at `place`."""
    glyphs = [_glyph(font, letter) for letter in text]
    start = font.size  # room for letters that reach to the left of their place
    length = sum(advance for _, _, advance in glyphs)
    line = np.zeros((len(glyphs[0][0]), length + 3 * start), dtype=np.uint8)
    x = start
    for mask, left, advance in glyphs:
        cell = line[:, x + left : x + left + mask.shape[1]]
        np.maximum(cell, mask, out=cell)
        x += advance
    image.paste(ink, (int(place[0]) - start, int(place[1])), Image.fromarray(line))


def _words(rng: np.random.Generator, count: int) -> str:
    """Return words of the list, or of random letters."""
    if rng.random() < 0.7:
        return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), count).tolist())
    letters = [LETTERS[i] for i in rng.integers(0, len(LETTERS), 5 * count).tolist()]
    for space in np.cumsum(rng.integers(2, 9, count)).tolist():
        if space < len(letters):
            letters[space] = " "
    return "".join(letters)


def _paragraph(rng: np.random.Generator, image: Image.Image) -> None:
    """Write lines of one font from a random height on."""
    ground, ink = _pair(rng)
    image.paste(ground, (0, 0, *image.size))
    font = _font(rng, 7, 40)
    step = int(font.size * rng.uniform(1.1, 1.8))
    x = rng.uniform(-2 * font.size, image.width / 4)
    lines = 1 + min(image.height // step, int(rng.integers(1, 16)))
    y = rng.uniform(-font.size, max(1, image.height - lines * step))
    for line in range(lines):
        words = _words(rng, 1 + image.width // (3 * font.size))
        _write(image, (x, y + line * step), words, ink, font)


def _headings(rng: np.random.Generator, image: Image.Image) -> None:
    """Write a few words, each with a font, size and colour of its own."""
    for x, y in _points(rng, image, int(rng.integers(1, 7))):
        font = _font(rng, 8, max(16, image.height / 2))
        _write(image, (x, y - font.size), _words(rng, int(rng.integers(1, 4))), _colour(rng), font)


# ---------------------------------------------------------------- shapes and lines


def _shapes(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw flat shapes, filled, outlined or both."""
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 10))):
        fill = _colour(rng) if rng.random() < 0.75 else None
        outline = _colour(rng) if fill is None or rng.random() < 0.3 else None
        style = {"fill": fill, "outline": outline, "width": int(rng.integers(1, 5))}
        match int(rng.integers(5)):
            case 0:
                pen.rectangle(_box(rng, image), **style)
            case 1:
                pen.ellipse(_box(rng, image), **style)
            case 2:
                pen.rounded_rectangle(_box(rng, image), int(rng.integers(2, 20)), **style)
            case 3:
                pen.pieslice(_box(rng, image), *rng.uniform(0, 360, 2).tolist(), **style)
            case _:
                pen.polygon(_points(rng, image, int(rng.integers(3, 7))), **style)


def _lines(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw lines at any angle and arcs, often one pixel wide."""
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 16))):
        width = _log_uniform(rng, 0.6, 8)
        if rng.random() < 0.3:
            start, end = rng.uniform(0, 360, 2).tolist()
            pen.arc(_box(rng, image), start, end, _colour(rng), width)
        else:
            pen.line(_points(rng, image, int(rng.integers(2, 4))), _colour(rng), width)


def _grid(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw the lines of a grid at equal distances."""
    pen, colour = ImageDraw.Draw(image), _colour(rng)
    width = int(rng.integers(1, 4))
    for x in range(int(rng.integers(20)), image.width, width + _log_uniform(rng, 2, 40)):
        pen.line((x, 0, x, image.height), colour, width)
    for y in range(int(rng.integers(20)), image.height, width + _log_uniform(rng, 2, 40)):
        pen.line((0, y, image.width, y), colour, width)


# ---------------------------------------------------------------- patterns


def _ramp(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Return levels 0...255 `[H, W]` that rise in one direction, or from a centre."""
    x, y = (np.arange(side, dtype=np.float32) for side in image.size)
    if rng.random() < 0.25:
        ((a, b),) = _points(rng, image, 1)
        ramp = np.hypot(x - np.float32(a), (y - np.float32(b))[:, None])
    else:
        angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.5 else math.pi / 2 * rng.integers(4)
        ramp = np.float32(math.cos(angle)) * x + np.float32(math.sin(angle)) * y[:, None]
    ramp -= ramp.min()
    return (ramp * np.float32(255 / max(ramp.max(), 1e-6))).astype(np.uint8)


def _blend(levels: np.ndarray, low: Colour, high: Colour) -> Image.Image:
    """Return colours between two given ones, by levels 0...255 `[H, W]`."""
    image = Image.fromarray(levels)
    image.putpalette(np.linspace(low, high, 256).round().astype(np.uint8).tobytes())
    return image.convert("RGB")


def _gradient(rng: np.random.Generator, image: Image.Image) -> None:
    image.paste(_blend(_ramp(rng, image), _colour(rng), _colour(rng)))


def _stripes(rng: np.random.Generator, image: Image.Image) -> None:
    """Fill with stripes or a checkerboard of 1 to 4 pixels."""
    period = int(rng.integers(1, 5))
    x, y = (np.arange(side) // period for side in image.size)
    across, down = _pick(rng, ((1, 0), (0, 1), (1, 1)))
    pattern = (across * x + down * y[:, None]) % 2 * 255
    image.paste(_blend(pattern.astype(np.uint8), *_pair(rng)))


def _dither(rng: np.random.Generator, image: Image.Image) -> None:
    """Fill with a gradient in few colours, by an ordered dither or Floyd and Steinberg's."""
    ramp = _ramp(rng, image)
    if rng.random() < 0.5:
        tiles = np.tile(16 * BAYER + 8, [side // 4 + 1 for side in ramp.shape])
        bits = ramp > tiles[: image.height, : image.width]
        image.paste(_blend(bits * np.uint8(255), *_pair(rng)))
    elif rng.random() < 0.5:
        bits = Image.fromarray(ramp).convert("1").convert("L")
        image.paste(_blend(np.asarray(bits), *_pair(rng)))
    else:
        palette = Image.new("P", (1, 1))
        palette.putpalette([level for colour in CORNERS for level in colour])
        smooth = _blend(ramp, _colour(rng), _colour(rng))
        image.paste(smooth.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))


# ---------------------------------------------------------------- charts and windows


def _chart(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw axes with labels, and bars, curves or points."""
    ground, ink = _pair(rng)
    image.paste(ground, (0, 0, *image.size))
    pen, font = ImageDraw.Draw(image), _font(rng, 7, 14)
    width, height = image.size
    left, bottom = width * rng.uniform(0.05, 0.2), height * rng.uniform(0.8, 0.95)
    for y in np.arange(bottom, 0, -height / rng.integers(3, 8)).tolist():
        pen.line((left, y, width, y), (160, 160, 160))
        _write(image, (1, y - 5), str(rng.integers(1000)), ink, font)
    count = int(rng.integers(3, 20))
    step = (width - left) / count
    for _ in range(int(rng.integers(1, 4))):
        colour, kind = _colour(rng), int(rng.integers(3))
        xs = left + step * (np.arange(count) + rng.random())
        points = np.stack([xs, bottom * rng.random(count)], axis=1).tolist()
        if kind == 0:
            pen.line([(x, y) for x, y in points], colour, int(rng.integers(1, 4)))
        for x, y in points:
            if kind == 1:
                pen.rectangle((x, y, x + 0.6 * step, bottom), fill=colour)
            else:
                pen.ellipse((x - kind, y - kind, x + kind, y + kind), fill=colour)
    pen.line([(left, 0), (left, bottom), (width, bottom)], ink, int(rng.integers(1, 3)))
    _write(image, (left, bottom + 2), _words(rng, 4), ink, font)


def _table(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw rows of cells with a word in each, every second row shaded in some."""
    ground, ink = _pair(rng)
    image.paste(ground, (0, 0, *image.size))
    pen, font = ImageDraw.Draw(image), _font(rng, 7, 18)
    height, width = (int(font.size * rng.uniform(*span)) for span in ((1.3, 2), (3, 8)))
    shades = (ground, _colour(rng) if rng.random() < 0.5 else ground)
    outline = ink if rng.random() < 0.7 else None
    for row, y in enumerate(range(0, image.height, height)):
        for x in range(0, image.width, width):
            pen.rectangle((x, y, x + width, y + height), fill=shades[row % 2], outline=outline)
            _write(image, (x + 2, y + 1), _pick(rng, WORDS), ink, font)


def _window(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw a window with a title bar, a panel, buttons and icons."""
    paper, ink = _pair(rng)
    pen, font, accent = ImageDraw.Draw(image), _font(rng, 8, 16), _colour(rng)
    size = font.size
    left, top = (int(rng.uniform(-0.3, 0.3) * side) for side in image.size)
    right, bottom = (int(rng.uniform(0.7, 1.3) * side) for side in image.size)
    pen.rectangle((left, top, right, bottom), fill=paper, outline=ink)
    panel = Image.new("RGB", (right - left - 1, max(1, bottom - top - 1)), paper)
    _pick(rng, (_paragraph, _paragraph, _table))(rng, panel)
    image.paste(panel, (left + 1, top + 1))
    pen.rectangle((left, top, right, top + 2 * size), fill=accent, outline=ink)
    _write(image, (left + 4, top + size // 2), _words(rng, 3), _pick(rng, (ink, WHITE)), font)
    for place, colour in enumerate(CORNERS[:3]):
        x = right - size * (place + 1) * 3 // 2
        pen.ellipse((x, top + size // 2, x + size, top + size * 3 // 2), fill=colour)
    for x, y in _points(rng, image, int(rng.integers(1, 5))):
        if rng.random() < 0.5:
            icon = Image.new("RGB", (2 * size, 2 * size), _colour(rng))
            _pick(rng, (_shapes, _lines))(rng, icon)
            image.paste(icon, (int(x), int(y)))
        else:
            box = (x, y, x + 5 * size, y + 1.8 * size)
            pen.rounded_rectangle(box, radius=size // 3, fill=_colour(rng), outline=ink)
            _write(image, (x + size / 2, y + size / 3), _pick(rng, WORDS), ink, font)


Drawing = Callable[[np.random.Generator, Image.Image], None]
# Text and windows stand here more than once: they are most of what screens show.
PANELS: tuple[Drawing, ...] = (
    *(_paragraph, _paragraph, _paragraph, _headings, _headings, _window, _window, _window),
    *(_shapes, _shapes, _lines, _grid, _gradient, _stripes, _dither, _chart, _table),
)
OVERLAYS: tuple[Drawing, ...] = (_headings, _shapes, _lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write graphics that no training run draws, as PNG files in a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10, help="number of graphics (default: 10)")
    parser.add_argument("--size", type=int, default=512, help="side in pixels (default: 512)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for number in range(args.count):
        graphic = draw(draws.for_test_graphic(number), args.size)
        Image.fromarray(graphic).save(args.folder / f"graphic{number:02d}.png")


if __name__ == "__main__":
    main()
