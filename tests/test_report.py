"""The report: all in one file, images and sizes as the codec gives them, and it works."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report
from classical_codecs import CODECS
from codec_helpers import make_image
from PIL import Image
from rd_helpers import write_results

import cmamba_ref

MODEL = Path(__file__).parent / "golden" / "model"
DEMO_IMAGE = Path(cmamba_ref.__file__).parent / "data" / "coffee.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUALITY = 6


class Checker(html.parser.HTMLParser):
    """Fails where elements are not nested properly, or an input has no name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "input":
            assert "label" in self.open  # has a name for those who do not see it
        if tag not in ("img", "input", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def images_of(text: str) -> list[np.ndarray]:
    """The embedded images of a page."""
    uris = re.findall(r'<figure><img src="data:image/png;base64,(.*?)"', text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris]


def captions_of(text: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """A crop of the demo image, whose name has to be escaped."""
    path = tmp_path_factory.mktemp("images") / "a <b> & 'c'.png"
    with Image.open(DEMO_IMAGE) as image:
        image.crop((20, 30, 220, 200)).save(path)
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return write_results(tmp_path_factory.mktemp("results"))


def run(results: Path, output: Path, *more: str) -> str:
    assert report.main([str(results), "--model", str(MODEL), "-o", str(output), *more]) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def made(image, results, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "report.html"
    run(results, output, "--image", str(image), "--quality", str(QUALITY))
    return output


# ---------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(made):
    text = made.read_text()
    assert not Checker(text).open  # every element was closed
    addresses = re.findall(r'\b(?:src|href|srcset|data)="(.*?)"', text)
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text
    assert not list(made.parent.glob(".*"))


def test_curves_rates_and_provenance(made):
    text = made.read_text()
    # 1.2 over 2 is 40 % less.
    for cell in ("−40.00 %", "0.1440", "31.30", "0.9900", "0.111", "4"):
        assert f"<td>{cell}</td>" in text
    assert "against JPEG on kodak" in text and "abc1234" in text and "an abacus" in text
    assert "CMamba &lt;random&gt;" in text and "<random>" not in text
    plots = re.findall(r'src="data:image/svg\+xml;base64,(.*?)"', text)
    assert len(plots) == 2  # by PSNR and by MS-SSIM
    assert b"<svg" in base64.b64decode(plots[0])


def test_images_and_sizes_are_those_of_the_codecs(made, image):
    captions = captions_of(made.read_text())
    original = np.array(Image.open(image))
    model = cmamba_ref.CMamba.from_pretrained(MODEL)
    ours = cmamba_ref.encode(original, model, QUALITY)
    expected = [original, cmamba_ref.decode(ours, model)]
    sizes = [image.stat().st_size, len(ours)]
    for codec in [CODECS[key] for key in report.BASELINES if CODECS[key].is_available()]:
        quality = int(re.search(r"quality (\d+)", captions[len(expected)])[1])
        data = codec.encode(original, quality)
        expected.append(codec.decode(data))
        sizes.append(len(data))
    assert len(captions) == len(expected) >= 3
    for image, caption, shown, size in zip(
        images_of(made.read_text()), captions, expected, sizes, strict=True
    ):
        assert np.array_equal(image, shown) and f"{size:,} bytes" in caption
    psnr = 10 * np.log10(255**2 / np.mean((original - expected[1].astype(float)) ** 2))
    assert f"PSNR {psnr:.2f} dB" in captions[1]
    assert f"{8 * len(ours) / (200 * 170):.3f} bpp" in captions[1]


def test_large_images_are_cropped_without_loss(made, image, results, tmp_path):
    """And the crops are drawn, which need the same coded images."""
    arguments = ["--image", str(image), "--quality", str(QUALITY), "--side", "100"]
    crops = tmp_path / "crops.png"
    text = run(results, tmp_path / "small.html", *arguments, "--crops", str(crops))
    whole = made.read_text()
    found = re.search(r"the (\d+)x(\d+) pixels from column (\d+), row (\d+)", text)
    width, height, left, top = map(int, found.groups())
    assert width == height == 100
    for small, large in zip(images_of(text), images_of(whole), strict=True):
        assert np.array_equal(small, large[top : top + height, left : left + width])
    assert captions_of(text) == captions_of(whole)  # sizes are still those of the whole image
    with Image.open(crops) as image:
        assert image.height == report.CROP + report.CAPTION


SCRIPT = """
<script>
addEventListener("load", () => {
  const set = (name, value, event) => {
    const input = document.querySelector(name);
    input.value = value;
    input.dispatchEvent(new Event(event));
  };
  set("[data-side=left]", 0, "change");
  set("[data-boundary]", 20, "input");
  set("[data-extent]", 48, "change");
  set("[data-across]", 7, "input");
  set("[data-down]", 11, "input");
  const pixels = [...document.querySelectorAll("canvas")].map((canvas) => [
    ...canvas.getContext("2d").getImageData(0, 0, 48, 48).data]);
  const stage = document.querySelector(".stage");
  document.body.append(Object.assign(document.createElement("pre"), {
    id: "seen",
    textContent: JSON.stringify({
      clip: stage.querySelectorAll("img")[1].style.clipPath,
      line: stage.querySelector(".line").style.left,
      says: document.querySelector("[data-boundary]").getAttribute("aria-valuetext"),
      width: stage.clientWidth,
      hidden: document.querySelectorAll("[data-needs-script][hidden]").length,
      pixels,
    }),
  }));
});
</script>
"""


def test_the_page_works_in_a_browser(made, tmp_path):
    """The slider moves the boundary, the details are those of the images, nothing is logged."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    page = tmp_path / "page.html"
    page.write_text(made.read_text() + SCRIPT)
    done = subprocess.run(
        [
            *[browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"],
            *["--disable-background-networking", "--disable-component-update", "--disable-sync"],
            *["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"],
            *[f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr  # where errors of a page are logged
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))
    assert seen["clip"].startswith("inset(0px 80% 0px 0px") and seen["line"] == "20%"
    assert seen["says"].startswith("20 % Original, 80 % CMamba")
    assert seen["width"] > 200 and seen["hidden"] == 0
    for pixels, image in zip(seen["pixels"], images_of(made.read_text()), strict=True):
        shown = np.array(pixels, np.uint8).reshape(48, 48, 4)[..., :3]
        assert np.array_equal(shown, image[11:59, 7:55])


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("size", [10, 900, 1500, 10**6])
def test_the_nearest_file_is_the_nearest_of_all(size):
    original, codec = make_image(48, 64), CODECS["jpeg420"]
    quality, data = report.nearest_file(codec, original, size)
    assert data == codec.encode(original, quality)
    every = [len(codec.encode(original, q)) for q in range(1, 101)]
    assert abs(len(data) - size) == min(abs(length - size) for length in every)


def test_the_most_detailed_place():
    flat = np.full((120, 200, 3), 90, np.uint8)
    flat[60:100, 130:170] = make_image(40, 40)
    found = report.most_detailed(flat, 40)
    assert abs(found.left - 130) <= 1 and abs(found.top - 60) <= 1
    assert (found.width, found.height) == (40, 40)
    assert report.most_detailed(flat[:30], 40).height == 30


def test_a_window_keeps_to_the_image():
    image = make_image(60, 90)
    assert report.window_around(image, 30, 45, 20) == (35, 20, 20, 20)
    assert report.window_around(image, 58, 2, 20) == (0, 40, 20, 20)
    assert report.window_around(image, 58, 2, 70) == (0, 0, 70, 60)


def test_without_images_there_is_no_script(results, tmp_path):
    text = run(results, tmp_path / "report.html")
    assert not images_of(text) and "<script>" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image", "none.png"], "none.png"),
        (["--image", "{image}", "--quality", "9"], "quality"),
        (["--anchor", "{results}:vtm"], "vtm"),
        (["--side", "0"], "--side"),
        (["--crops", "crops.png"], "--image"),
        (["-o", "no/such/folder/report.html"], "no/such/folder"),
    ],
)
def test_wrong_arguments_are_refused(results, image, tmp_path, capsys, change, message):
    output = tmp_path / "report.html"
    more = [text.format(results=results, image=image) for text in change]
    with pytest.raises(SystemExit) as stopped:
        report.main([str(results), "--model", str(MODEL), "-o", str(output), *more])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not output.exists()


def test_crops_of_all_versions_are_drawn_side_by_side(image):
    """Each panel is the same part of its version, pixel for pixel."""
    original = report.read_rgb(image)
    shades = [report.Version(f"shade {k}", np.full_like(original, k), 7) for k in (50, 90)]
    figure = np.asarray(report.crops_side_by_side(original, shades))
    side, step = report.CROP, report.CROP + report.GAP
    assert figure.shape == (side + report.CAPTION, 3 * step - report.GAP, 3)
    detail = report.most_detailed(original, side).of(original)
    assert np.array_equal(figure[: detail.shape[0], : detail.shape[1]], detail)
    for k, shade in enumerate((50, 90), start=1):
        panel = figure[: detail.shape[0], k * step : k * step + detail.shape[1]]
        assert (panel == shade).all()
    assert (figure[side:] < 128).any()  # the captions


def test_an_image_that_cannot_be_coded_leaves_no_page(
    results, image, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(report, "versions_of", fail)
    output = tmp_path / "report.html"
    with pytest.raises(SystemExit):
        run(results, output, "--image", str(image))
    assert "not enough memory" in capsys.readouterr().err and not output.exists()
