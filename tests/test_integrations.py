"""Other programs and libraries handle .cmb files: desktops, ImageMagick, file(1), imageio, ..."""

import configparser
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_helpers import ENVIRONMENT, make_image
from PIL import Image

import cmamba_ref
import cmamba_ref.pillow_plugin
from cmamba_ref.cli import main
from cmamba_ref.cli.integrate import INTEGRATIONS

IMAGE = make_image(70, 90)


@pytest.fixture(scope="module")
def data() -> bytes:
    """A file of the bundled model, which other programs decode with."""
    return cmamba_ref.encode(IMAGE)


@pytest.fixture
def photo(tmp_path: Path, data: bytes) -> Path:
    """In a folder of its own, under a name that shells and desktops might mistake."""
    path = tmp_path / "files" / "it's $(a) photo.cmb"
    path.parent.mkdir()
    path.write_bytes(data)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The command `cmamba` in PATH, and an empty home."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "cmamba"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cmamba_ref "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    return ENVIRONMENT | {"PATH": path, "HOME": str(tmp_path)}


def need(*programs: str) -> str:
    """The first of these programs that is installed; skips where there is none."""
    for program in programs:
        if found := shutil.which(program):
            return found
    pytest.skip(f"not installed: {' or '.join(programs)}")


def output(*command: str | Path, **options) -> str:
    """The stdout of a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["integrate", "--print", name]) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- desktops and tools


def test_every_text_is_printed_and_explained(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them without a name; help and documentation say where they go."""
    texts = [printed(name, capsys) for name in INTEGRATIONS]
    assert main(["integrate"]) == 0
    everything = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["integrate", "--help"])
    explained = capsys.readouterr().out
    documented = (root / "docs" / "usage.md").read_text()
    for text, (name, integration) in zip(texts, INTEGRATIONS.items(), strict=True):
        assert text == integration.text and f"\n\n{text}" in everything
        for part in (integration.place, integration.activation):
            assert part in everything and part in explained
            assert re.split("[ ,;]", part)[0] in documented
        assert f"| `{name}` |" in documented


def test_desktops_know_the_type(
    photo: Path, tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    update, gio = need("update-mime-database"), shutil.which("gio")
    mime = tmp_path / "mime"
    (mime / "packages").mkdir(parents=True)
    (mime / "packages" / "cmamba.xml").write_text(printed("mime", capsys))
    output(update, mime)
    assert "50:image/x-cmamba:*.cmb" in (mime / "globs2").read_text().splitlines()
    assert b"[50:image/x-cmamba]\n>0=\0\4\x8fCMB\n" in (mime / "magic").read_bytes()
    if gio:
        unnamed = photo.with_name("unnamed")  # by its content
        unnamed.write_bytes(data)
        env = ENVIRONMENT | {"XDG_DATA_HOME": str(tmp_path)}
        for path in (photo, unnamed):
            described = output(gio, "info", "-a", "standard::content-type", path, env=env)
            assert "image/x-cmamba" in described


def test_desktops_show_previews(
    photo: Path, tmp_path: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As Tumbler does it: the output exists, and is read through a handle from before."""
    need("sh")
    entry = configparser.RawConfigParser()
    entry.read_string(printed("thumbnailer", capsys))
    section = entry["Thumbnailer Entry"]
    assert shutil.which(section["TryExec"], path=environment["PATH"])
    assert section["MimeType"] == "image/x-cmamba;"
    target = tmp_path / ".thumbnail.XY12Z3"
    values = {"%i": str(photo), "%o": str(target), "%s": "64"}
    command = [values.get(part, part) for part in shlex.split(section["Exec"])]
    with target.open("w+b") as opened:
        output(*command, env=environment, cwd=photo.parent)
        with Image.open(io.BytesIO(opened.read())) as preview:
            assert (preview.format, preview.size) == ("PNG", (64, 50))
    assert [path.name for path in photo.parent.iterdir()] == [photo.name]


def test_imagemagick_reads_the_format(
    photo: Path,
    tmp_path: Path,
    data: bytes,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert = need("magick", "convert")  # of version 7, of version 6
    if not subprocess.run([convert, "-version"], capture_output=True).stdout.startswith(
        b"Version: ImageMagick"
    ):
        pytest.skip(f"{convert} is not ImageMagick's")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "delegates.xml").write_text(printed("imagemagick", capsys))
    environment["MAGICK_CONFIGURE_PATH"] = str(tmp_path / "config")
    output(convert, photo, tmp_path / "back.png", env=environment)
    with Image.open(tmp_path / "back.png") as back:
        difference = np.asarray(back, int) - cmamba_ref.decode(data)
    assert np.abs(difference).max() <= 1  # another process, see docs/format.md


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("colour.cmb", "version 1, 83 x 61"),
        ("grey.cmb", "version 1, 130 x 64, grey"),
        ("alpha.cmb", "version 1, 83 x 61, with alpha"),
        ("full.cmb", "version 1, 70 x 64, grey, with alpha"),
        ("version0/colour.cmb", "version 0, 83 x 61"),
        ("version0/grey.cmb", "version 0, 130 x 64, grey"),
        ("later.cmb", "version 2"),
    ],
)
def test_file_describes_the_format(
    root: Path, tmp_path: Path, name: str, description: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, rule, path = need("file"), tmp_path / "rule", root / "tests" / "golden" / name
    rule.write_text(printed("file", capsys))
    if name == "later.cmb":
        path = tmp_path / name
        path.write_bytes(b"\x8fCMB\2 and other fields than those of version 1")
    found = output(program, "--brief", "--magic-file", rule, path)
    assert found == f"CMamba image data, {description}\n"
    assert output(program, "--brief", "--mime-type", "-m", rule, path) == "image/x-cmamba\n"


# ---------------------------------------------------------------- Python's image libraries


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_imageio_and_scikit_image_handle_the_format(tmp_path: Path, mode: str) -> None:
    """By the suffix and by the content, as arrays of the channels that the file has."""
    iio = pytest.importorskip("imageio.v3", reason="imageio is not installed")
    skimage = pytest.importorskip("skimage.io", reason="scikit-image is not installed")
    with_alpha = np.dstack([IMAGE, IMAGE[..., 0]])
    image = np.asarray(Image.fromarray(with_alpha).convert(mode))
    path, saved = tmp_path / "photo.cmb", tmp_path / "saved.cmb"
    path.write_bytes(cmamba_ref.encode(image))
    decoded = cmamba_ref.decode(path.read_bytes())
    assert decoded.shape == image.shape
    for read in (iio.imread, skimage.imread):
        np.testing.assert_array_equal(read(path), decoded)
    np.testing.assert_array_equal(iio.imread(path.read_bytes()), decoded)
    assert iio.improps(path).shape == decoded.shape
    iio.imwrite(saved, image, quality=2)
    assert saved.read_bytes() == cmamba_ref.encode(image, quality=2)
    skimage.imsave(saved, image)
    assert saved.read_bytes() == path.read_bytes()


def test_documented_dataset_is_read_by_workers(root: Path, tmp_path: Path) -> None:
    """In a program of its own, whose workers are spawned and import it."""
    pages = (root / "docs" / "usage.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", pages, re.S) if "DataLoader" in c)
    (tmp_path / "train.py").write_text(f"{code}    torch.save(batch, 'batch.pt')\n")
    (tmp_path / "small").mkdir()
    files = [cmamba_ref.encode(make_image(64, 96, seed)) for seed in range(3)]
    for number, data in enumerate(files):
        (tmp_path / "small" / f"{number}.cmb").write_bytes(data)
    out = output(sys.executable, "-W", "error", "train.py", cwd=tmp_path, env=ENVIRONMENT)
    assert out == "torch.Size([3, 3, 64, 96])\n"
    values = torch.load(tmp_path / "batch.pt").permute(0, 2, 3, 1) * 255
    decoded = np.stack([cmamba_ref.decode(data) for data in files])
    assert np.abs(values.numpy() - decoded).max() <= 1.01  # other processes, see docs/format.md
