"""The command `cmamba`: what it writes, what it says, and what it refuses."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import cmamba_ref
from cmamba_ref import CMamba, atomic_write, bundled, codec
from cmamba_ref.cli import commands, demo, main, threads
from cmamba_ref.codec.images import read_image
from cmamba_ref.codec.output import shrink
from cmamba_ref.config import TINY
from cmamba_ref.metrics import psnr
from cmamba_ref.model import DEFAULT_QUALITY

HEIGHT, WIDTH = 70, 90
SMALL = {
    "widths": (8, 8, 8),
    "latent_channels": 16,
    "hyper_widths": (8, 8),
    "slices": 2,
    "cae_width": 8,
    "lrp_widths": (8, 8),
}


def make_model(directory: Path, seed: int = 0, **changes: object) -> str:
    """An untrained model of few channels, on disk."""
    torch.manual_seed(seed)
    model = CMamba(dataclasses.replace(TINY, **SMALL, **changes))
    model.update()
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Generator[None, None, None]:
    """Two threads that wait for each other on a busy machine take many times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_dir: str) -> CMamba:
    return CMamba.from_pretrained(model_dir)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image whose sides are no multiples of 64, in a directory of its own."""
    image = Image.open(demo.DEMO_IMAGE).crop((100, 100, 100 + WIDTH, 100 + HEIGHT))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def encoded(photo: Path, model: CMamba) -> Path:
    path = photo.with_suffix(".cmb")
    path.write_bytes(cmamba_ref.encode(read_image(photo), model))
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What followed `cmamba: error: ` on the only line that was printed."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("cmamba: error: ")
    return line.removeprefix("cmamba: error: ")


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m cmamba_ref` in a process of its own."""
    root = str(Path(cmamba_ref.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "cmamba_ref", *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------- encode and decode


def test_encode_writes_what_the_api_returns(
    photo: Path, model: CMamba, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(photo), "--model", model_dir, "--quality", "2.5"]) == 0
    data = photo.with_suffix(".cmb").read_bytes()
    assert data == cmamba_ref.encode(read_image(photo), model, 2.5)
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = out.splitlines()
    bpp = 8 * len(data) / (WIDTH * HEIGHT)
    assert f"photo.cmb: {len(data)} bytes, {bpp:.3f} bpp, {WIDTH}x{HEIGHT}, encoded in" in line


@pytest.mark.parametrize("grey", [False, True])
def test_decode_writes_what_the_api_returns(
    photo: Path, model: CMamba, model_dir: str, grey: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    image = read_image(photo)
    data = cmamba_ref.encode(image[..., 0] if grey else image, model)
    encoded = photo.with_name("a.cmb")
    encoded.write_bytes(data)
    assert main(["decode", str(encoded), "--model", model_dir]) == 0
    decoded = read_image(photo.with_name("a.png"))
    np.testing.assert_array_equal(decoded, cmamba_ref.decode(data, model))
    assert decoded.ndim == (2 if grey else 3)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"a.png: {WIDTH}x{HEIGHT} {'grey' if grey else 'RGB'}, decoded in" in line


def test_only_named_outputs_are_written(photo: Path, model_dir: str) -> None:
    middle, back = photo.with_name("x.y.cmb"), photo.with_name("back.PNG")
    assert main(["encode", str(photo), "-o", str(middle), "--model", model_dir]) == 0
    assert main(["decode", str(middle), "-o", str(back), "--model", model_dir]) == 0
    assert names(photo.parent) == ["back.PNG", "photo.png", "x.y.cmb"]


def test_the_output_can_follow_the_input(
    photo: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for cp, cjxl and avifenc, where its suffix says that it is the output."""
    out, back = photo.with_name("out.CMB"), photo.with_name("back.png")
    assert main(["encode", str(photo), "--model", model_dir, str(out)]) == 0
    assert main(["decode", str(out), str(back), "--model", model_dir]) == 0
    assert names(photo.parent) == ["back.png", "out.CMB", "photo.png"]
    capsys.readouterr()
    assert main(["encode", str(photo), str(out), "--model", model_dir]) == 1
    assert "must not exist yet" in error_line(capsys)


@pytest.mark.parametrize("made", [False, True])
def test_the_output_of_one_file_can_be_a_folder(photo: Path, model_dir: str, made: bool) -> None:
    """One that ends in a slash is made."""
    folder = photo.with_name("a") / "b"
    if made:
        folder.mkdir(parents=True)
    args = ["encode", str(photo), "--model", model_dir, "-o"]
    assert main([*args, str(folder) if made else f"{folder}/"]) == 0
    assert names(folder) == ["photo.cmb"]


def test_default_quality_equals_the_api(photo: Path, encoded: Path, model_dir: str) -> None:
    out = photo.with_name("a.cmb")
    assert main(["encode", str(photo), "-o", str(out), "--model", model_dir]) == 0
    assert out.read_bytes() == encoded.read_bytes()


@pytest.mark.parametrize("option", ["--effort=1", "--target-size=9000"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_model_cannot_do_is_wrong_usage(
    option: str, count: int, tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture
) -> None:
    fixed, out = make_model(tmp_path / "fixed", lmbdas=()), tmp_path / "out"
    photos = [photo, shutil.copy(photo, photo.with_name("another.png"))][:count]
    args = ["encode", *map(str, photos), "-o", f"{out}/", "--model", fixed, "--jobs", "1"]
    assert main([*args, option]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "rate" in err  # once, not for each file
    assert not list(out.glob("*"))
    assert main(args) == 0


def test_wrong_usage_makes_no_folder(photo: Path, tmp_path: Path) -> None:
    assert main(["encode", str(photo), "-o", f"{tmp_path}/new/", "--nearest"]) == 2
    assert not (tmp_path / "new").exists()


def test_fixed_rate_model(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture) -> None:
    fixed = make_model(tmp_path / "fixed", lmbdas=())
    assert main(["encode", str(photo), "--model", fixed]) == 0
    assert main(["info", str(photo.with_suffix(".cmb"))]) == 0
    assert "fixed-rate model" in capsys.readouterr().out
    assert main(["encode", str(photo), "--model", fixed, "--force", "--quality", "4"]) == 2
    assert "`quality` must be None" in error_line(capsys)


# ---------------------------------------------------------------- efforts and targets


def test_an_effort_gives_what_the_api_gives(photo, model, model_dir) -> None:
    assert main(["encode", str(photo), "--model", model_dir, "--effort", "1"]) == 0
    refined = cmamba_ref.encode(read_image(photo), model, effort=1)
    assert photo.with_suffix(".cmb").read_bytes() == refined


def test_ctrl_c_ends_a_search_and_keeps_the_best(photo, model_dir, monkeypatch, capsys) -> None:
    from cmamba_ref.codec import refinement

    anneal, steps = refinement._Problem.anneal, []

    def interrupted(*args):
        for _ in anneal(*args):
            steps.append(_)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield

    monkeypatch.setattr(refinement._Problem, "anneal", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert main(["encode", str(photo), "--model", model_dir, "--effort", "2"]) == 0
    assert len(steps) == 3
    out, err = capsys.readouterr()
    assert err == "cmamba: warning: the search was ended after step 3 of 27\n"
    assert main(["verify", str(photo.with_suffix(".cmb")), "--model", model_dir]) == 0
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_target_size_is_met(photo, model, model_dir, capsys) -> None:
    image = read_image(photo)
    smallest, largest = (len(cmamba_ref.encode(image, model, quality)) for quality in (1, 8))
    size = (smallest + largest) // 2
    args = ["encode", str(photo), "--model", model_dir]
    assert main([*args, "--target-size", str(size)]) == 0
    data = photo.with_suffix(".cmb").read_bytes()
    assert 0.95 * size <= len(data) <= size
    (quality,) = re.findall(r"bpp, quality ([\d.]+), ", capsys.readouterr().out)
    assert data == cmamba_ref.encode(image, model, float(quality))

    assert main([*args, "--force", "--target-bpp", "1000"]) == 1
    assert "1000 bits per pixel cannot be reached; the nearest is" in error_line(capsys)
    assert photo.with_suffix(".cmb").read_bytes() == data
    assert main([*args, "--force", "--target-bpp", "1000", "--nearest"]) == 0
    assert photo.with_suffix(".cmb").read_bytes() == cmamba_ref.encode(image, model, 8)


def test_targets_hold_for_each_file_of_a_folder(photo, model_dir) -> None:
    Image.open(photo).rotate(90, expand=True).save(photo.with_name("turned.png"))
    args = ["encode", str(photo.parent), "--model", model_dir, "--jobs", "2"]
    assert main([*args, "--target-bpp", "1000", "--nearest"]) == 0
    for name in ("photo", "turned"):
        image = read_image(photo.with_name(f"{name}.png"))
        best = cmamba_ref.encode(image, CMamba.from_pretrained(model_dir), 8)
        assert photo.with_name(f"{name}.cmb").read_bytes() == best


@pytest.mark.parametrize(
    "options",
    [
        ("--quality", "4", "--target-size", "1000"),
        ("--target-psnr", "30", "--target-size", "1000"),
        ("--target-size", "0"),
        ("--target-bpp", "nan"),
        ("--effort", "10"),
        ("--effort", "2.5"),
        ("--nearest",),
    ],
)
def test_wrong_efforts_and_targets_are_refused(photo, model_dir, options) -> None:
    command = ["encode", str(photo), "--model", model_dir, *options]
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert names(photo.parent) == ["photo.png"]


# ---------------------------------------------------------------- refused before the work


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_an_existing_file_needs_force(
    photo: Path,
    encoded: Path,
    model_dir: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, target = (photo, encoded) if command == "encode" else (encoded, photo)
    before = target.read_bytes()
    args = [command, str(source), "--model", model_dir]
    assert main(args) == 1
    assert "must not exist yet" in (message := error_line(capsys)) and "--force" in message
    assert target.read_bytes() == before

    os.utime(target, (0, 0))
    assert main([*args, "--force"]) == 0
    assert target.stat().st_mtime > 0
    assert names(photo.parent) == ["photo.cmb", "photo.png"]


def test_the_input_is_never_replaced(
    photo: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = photo.read_bytes()
    link = photo.with_name("link")
    link.symlink_to(photo)
    for target in (photo, link):
        args = ["encode", str(photo), "-o", str(target), "--model", model_dir, "--force"]
        assert main(args) == 1
        assert "must differ from the input" in error_line(capsys)
    assert photo.read_bytes() == before


def test_targets_must_be_files(
    photo: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["encode", str(photo), "--force", "--model", model_dir, "-o"]
    assert main([*args, os.devnull]) == 1  # a rename onto a device would replace the device
    assert "must be a file" in error_line(capsys)
    assert main([*args, str(photo.parent / "missing" / "a.cmb")]) == 1
    assert "must lie in an existing directory" in error_line(capsys)


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_an_unwritable_target_is_found_before_the_work(
    photo: Path,
    encoded: Path,
    model_dir: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And named as it was typed, also in a batch and by demo."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    for module, name in ((codec, "encode"), (codec, "decode_container"), (demo, "encode")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.chdir(photo.parent)
    Path("file").touch()
    Path("link.cmb").symlink_to("missing/a.cmb")
    Path("link.png").symlink_to("missing/a.png")
    source, suffix = ("photo.png", ".cmb") if command == "encode" else ("photo.cmb", ".png")
    args = [command, source, "--model", model_dir, "--force", "-o"]
    before = names(photo.parent)
    for target in (f"missing/a{suffix}", f"file/a{suffix}", f"link{suffix}"):
        assert main([*args, target]) == 1
        assert repr(target) in error_line(capsys)
    long = "n" * 300 + suffix
    assert main([*args, long]) == 1
    assert error_line(capsys) == f"{long}: File name too long"
    for folder in ("file/", "file/deeper/"):
        assert main([*args, folder]) == 1
        assert error_line(capsys).startswith("file")
    assert main([command, "missing", *args[1:], "file/deeper"]) == 1
    assert error_line(capsys) == "file/deeper: Not a directory"
    assert main(["demo", "-o", "file", "--model", model_dir]) == 1
    assert error_line(capsys) == "file: File exists"
    assert names(photo.parent) == before


@pytest.mark.parametrize("source", ["photo.cmb", "."])
def test_decode_shrinks_to_a_side(
    encoded: Path, model: CMamba, model_dir: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, and a folder of files; what is smaller stays as it is."""
    monkeypatch.chdir(encoded.parent)
    decoded = cmamba_ref.decode(encoded.read_bytes(), model)
    for side, shape in ((45, (35, 45, 3)), (90, decoded.shape)):
        args = ["--max-side", str(side), "-o", f"{side}/", "--model", model_dir, "--jobs", "1"]
        assert main(["decode", source, *args]) == 0
        image = read_image(Path(f"{side}/photo.png"))
        assert image.shape == shape
        np.testing.assert_array_equal(image, shrink(decoded, side))
    assert np.abs(shrink(decoded, 45).mean((0, 1)) - decoded.mean((0, 1))).max() < 2
    with pytest.raises(SystemExit, match="2"):
        main(["decode", source, "--max-side", "0"])


def test_decode_reports_that_it_shrinks(
    encoded: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    height, width = read_image(encoded.with_suffix(".png")).shape[:2]
    for side, end in ((45, ", shrunk to 45 pixels"), (90, " s")):
        target = encoded.with_name(f"{side}.png")
        args = ["--max-side", str(side), "-o", str(target), "--model", model_dir]
        assert main(["decode", str(encoded), *args]) == 0
        out = capsys.readouterr().out.rstrip()
        assert f" {width}x{height} RGB, " in out and out.endswith(end)


def test_shrinking_hides_the_colours_of_transparent_pixels() -> None:
    image = np.zeros((64, 96, 4), np.uint8)
    image[:, :30] = 200, 100, 50, 255
    image[:, 30:, 0] = 255  # red, which nobody sees
    shrunk = shrink(image, 24)
    assert shrunk.shape == (16, 24, 4)
    seen = shrunk[shrunk[..., 3] > 32]
    assert np.abs(seen[:, :3].astype(int) - (200, 100, 50)).max() <= 16


# ---------------------------------------------------------------- errors


def test_missing_input_is_named(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    for command in ("encode", "decode"):
        assert main([command, str(missing), "--model", model_dir]) == 1
        assert error_line(capsys) == f"{missing}: No such file or directory"


def test_a_mistyped_input_is_no_wrong_output(
    encoded: Path, photo: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the output for it exists already, or its folder does not."""
    photo.unlink()
    for name in (photo, photo.parent / "missing" / "a.png"):
        for command in ("encode", "decode"):
            assert main([command, str(name), "--model", model_dir]) == 1
            assert error_line(capsys) == f"{name}: No such file or directory"


def test_refused_image_is_named(
    photo: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("CMYK", (8, 8)).save(photo.with_name("ink.jpg"))
    assert main(["encode", str(photo.with_name("ink.jpg")), "--model", model_dir]) == 1
    assert "ink.jpg is in CMYK colours; convert it to RGB first, or" in error_line(capsys)
    assert names(photo.parent) == ["ink.jpg", "photo.png"]


@pytest.mark.parametrize("quality", ["0", "0.99", "8.01", "nan", "inf", "-1"])
def test_quality_out_of_range_is_refused(
    photo: Path, model_dir: str, quality: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(photo), "--model", model_dir, f"--quality={quality}"]) == 2
    assert "`quality` must be a number from 1 to 8, got" in error_line(capsys)
    assert names(photo.parent) == ["photo.png"]


def test_a_damaged_file_is_named(
    encoded: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = encoded.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    target = encoded.with_name("back.png")
    for data in (b"", b"hello", whole[: len(whole) // 2], bytes(damaged)):
        encoded.write_bytes(data)
        assert main(["decode", str(encoded), "-o", str(target), "--model", model_dir]) == 1
        assert error_line(capsys).startswith(f"{encoded}: ")
        assert not target.exists()


def test_file_of_another_model_is_refused(
    tmp_path: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    assert main(["decode", str(encoded), "-o", str(tmp_path / "a.png"), "--model", other]) == 1
    assert "needs model" in (message := error_line(capsys)) and "docs/models.md" in message


def test_empty_paths_are_wrong_usage(photo: Path, monkeypatch, capsys) -> None:
    """An unset variable is not the current folder."""
    monkeypatch.chdir(photo.parent)
    for args in ([""], [str(photo), "-o", ""], [str(photo), "--force", ""], ["--", ""]):
        with pytest.raises(SystemExit) as caught:
            main(["encode", *args])
        assert caught.value.code == 2
    assert names(photo.parent) == ["photo.png"]


def test_a_file_is_not_encoded_under_an_image_s_name(photo: Path, capsys) -> None:
    assert main(["encode", str(photo), "-o", str(photo.with_name("b.png"))]) == 2
    assert "`-o` must end in .cmb" in error_line(capsys)
    assert names(photo.parent) == ["photo.png"]


def test_no_folder_is_made_for_an_input_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert main(["encode", str(tmp_path / "a.png"), "-o", f"{tmp_path / 'new'}/"]) == 1
    assert "a.png" in error_line(capsys) and not names(tmp_path)


def test_inputs_may_follow_two_dashes(photo: Path, model_dir: str, monkeypatch) -> None:
    monkeypatch.chdir(photo.parent)
    photo.rename("-b.png")
    shutil.copy("-b.png", "a.png")
    assert main(["encode", "a.png", "-o", "o/", "--model", model_dir, "--", "-b.png"]) == 0
    assert names(Path("o")) == ["-b.cmb", "a.cmb"]


def test_missing_model_is_named(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", str(photo), "--model", "no-such-model"]) == 1
    assert "no config.json in 'no-such-model'" in error_line(capsys)


def test_pixel_limit(
    photo: Path, encoded: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--model", model_dir, "--force", "--max-pixels"]
    for path in (photo, encoded):
        command = "encode" if path == photo else "decode"
        assert main([command, str(path), *limit, str(WIDTH * HEIGHT - 1)]) == 1
        assert "max_pixels" in (message := error_line(capsys)) and str(path) in message
    enough = str(128 * 128)  # the codec counts the sides padded to multiples of 64
    assert main(["encode", str(photo), *limit, enough]) == 0
    assert main(["decode", str(encoded), *limit, enough]) == 0


@pytest.mark.parametrize("device", ["meta", "no-such-device", "cuda:99", "cpu:x"])
def test_unavailable_device_is_named(
    photo: Path, model_dir: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encode", str(photo), "--model", model_dir, "--device", device]) == 2
    message = error_line(capsys)
    assert message.startswith(f"`device` must be one that PyTorch can use here, got '{device}' (")
    assert message.endswith("); use cpu")
    assert names(photo.parent) == ["photo.png"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 TiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_limit_is_reported(
    photo: Path,
    model_dir: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(codec, "encode", fail)
    assert main(["encode", str(photo), "--model", model_dir]) == 1
    assert error_line(capsys).startswith("not enough memory")


def test_a_programming_error_is_not_hidden(
    photo: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("a mistake in this package")

    monkeypatch.setattr(codec, "encode", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["encode", str(photo), "--model", model_dir])


def test_ctrl_c_exits_with_130(
    photo: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_write.os, "replace", interrupt)
    assert main(["encode", str(photo), "--model", model_dir]) == 130
    assert capsys.readouterr().err == "cmamba: interrupted\n"
    assert names(photo.parent) == ["photo.png"]


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_failed_write_keeps_the_old_output(
    photo: Path,
    encoded: Path,
    model_dir: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, data: bytes) -> int:
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` does: of no name

    monkeypatch.setattr(Path, "write_bytes", full)
    source, target = (photo, encoded) if command == "encode" else (encoded, photo)
    before = target.read_bytes()
    assert main([command, str(source), "--model", model_dir, "--force"]) == 1
    assert error_line(capsys) == f"{target}: No space left on device"
    assert target.read_bytes() == before
    assert names(photo.parent) == ["photo.cmb", "photo.png"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["squash"],
        ["encode"],
        ["encode", "a.png", "--quality", "good"],
        ["encode", "a.png", "--background", "no-colour"],
        ["encode", "a.png", "--background", "rgb(300,0,0)"],
        ["encode", "a.png", "--max-pixels", "0"],
        ["decode", "a.cmb", "--max-pixels", "1e6"],
        ["decode", "a.cmb", "--quality", "4"],
        ["info"],
        ["encode", "a.png", "--jobs", "1", "--no-such-option"],
        ["demo", "a.png"],
    ],
)
def test_usage_errors_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "usage: cmamba" in capsys.readouterr().err


# ---------------------------------------------------------------- progress


def test_progress_is_shown_on_a_terminal_only(
    photo: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["encode", str(photo), "--force", "--model", model_dir]
    assert main(args) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(args) == 0
    err = capsys.readouterr().err
    assert "stage 0" not in err
    shown = re.findall(r"cmamba: ([a-z ]+) \(stage (\d) of 4\)", err)
    assert shown == [
        ("reading", "1"),
        ("loading the model", "2"),
        ("encoding", "3"),
        ("writing", "4"),
    ]


# ---------------------------------------------------------------- info


def test_info(encoded: Path, model: CMamba, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(encoded)]) == 0
    out = capsys.readouterr().out
    size = encoded.stat().st_size
    assert out.startswith(f"{encoded}\n")
    for line in (
        r"format    version 1, checksums correct",
        rf"model     {model.model_id.hex()} \(not bundled with this version\)",
        rf"image     {WIDTH}x{HEIGHT}, colour",
        r"quality   4",
        rf"size      {size} bytes, {8 * size / (WIDTH * HEIGHT):.3f} bits per pixel",
        r"metadata  none",
        r"y         \d+ bytes, lanes: 1, shift: 0, skipped tables: \d+",
        r"z         \d+ bytes, lanes: 1",
    ):
        assert re.search(f"^  {line}$", out, re.MULTILINE), (line, out)


def test_info_names_the_bundled_model(
    encoded: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bundled, "PRETRAINED", Path(model_dir).parent)
    assert main(["info", str(encoded)]) == 0
    assert f"({Path(model_dir).name})" in capsys.readouterr().out


def test_info_continues_after_a_bad_file(
    tmp_path: Path, encoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.cmb"
    bad.write_bytes(encoded.read_bytes()[:-1])
    missing = tmp_path / "missing.cmb"
    assert main(["info", str(bad), str(missing), str(encoded)]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"cmamba: error: {bad}: the file is truncated: it has only {bad.stat().st_size} bytes",
        f"cmamba: error: {missing}: No such file or directory",
    ]
    assert out.startswith(str(encoded))


# ---------------------------------------------------------------- demo


def test_demo_accepts_a_custom_model(
    tmp_path: Path,
    model: CMamba,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "BASELINES", demo.BASELINES[:1])  # AVIF takes seconds
    (tmp_path / "cmamba-demo").mkdir()
    for name in ("coffee.cmb", "coffee.png"):  # as if from an earlier run
        (tmp_path / "cmamba-demo" / name).write_bytes(b"old")
    assert main(["demo", "--model", model_dir, "--quality", "3"]) == 0
    assert names(tmp_path / "cmamba-demo") == ["coffee.cmb", "coffee.png"]
    data = (tmp_path / "cmamba-demo" / "coffee.cmb").read_bytes()
    original = read_image(demo.DEMO_IMAGE)
    assert data == cmamba_ref.encode(original, model, 3)
    decoded = read_image(tmp_path / "cmamba-demo" / "coffee.png")
    np.testing.assert_array_equal(decoded, cmamba_ref.decode(data, model))
    out = capsys.readouterr().out
    ours = rf"CMamba quality 3 +{len(data)} +[\d.]+ +{psnr(original, decoded):.2f} +[\d.]+ +1\.00"
    assert re.search(ours, out), out
    assert re.search(r"^JPEG quality \d+ +\d+ ", out, re.MULTILINE)


def test_demo_never_replaces_its_image(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = demo.DEMO_IMAGE.read_bytes()
    assert main(["demo", "-o", str(demo.DEMO_IMAGE.parent), "--model", model_dir]) == 1
    assert "must differ from the input" in error_line(capsys)
    assert demo.DEMO_IMAGE.read_bytes() == before


def test_demo_with_the_bundled_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the README's first command runs."""
    assert main(["demo", "-o", str(tmp_path)]) == 0
    original, decoded = read_image(demo.DEMO_IMAGE), read_image(tmp_path / "coffee.png")
    assert psnr(original, decoded) > 26
    size = (tmp_path / "coffee.cmb").stat().st_size
    assert size < demo.DEMO_IMAGE.stat().st_size / 10
    out = capsys.readouterr().out
    assert f"CMamba quality 4 {size:>11}" in out
    for baseline in demo.BASELINES:
        row = re.search(rf"^{baseline.name} quality \d+ +(\d+) .* ([\d.]+)$", out, re.MULTILINE)
        assert row is not None, out
        assert float(row[2]) == round(int(row[1]) / size, 2)
    assert main(["info", str(tmp_path / "coffee.cmb")]) == 0
    assert "(tiny)" in capsys.readouterr().out


def test_a_match_is_the_lowest_quality_that_reaches_the_psnr() -> None:
    original = read_image(demo.DEMO_IMAGE)[:200, :200]
    jpeg = demo.BASELINES[0]
    assert jpeg.name == "JPEG"
    quality, data = demo.match(jpeg, original, 30.0)
    assert psnr(original, jpeg.decode(data)) >= 30
    assert psnr(original, jpeg.decode(jpeg.encode(original, quality - 1))) < 30
    lower, smaller = demo.match(jpeg, original, 29.0)
    assert lower < quality and len(smaller) < len(data)


def test_the_demo_says_where_a_baseline_falls_short() -> None:
    original = read_image(demo.DEMO_IMAGE)[:200, :200]
    jpeg = demo.BASELINES[0]
    assert demo.match(jpeg, original, 99.0) is None
    line = demo.baseline_line(jpeg, original, 99.0, ours=1)
    assert re.fullmatch(r"JPEG +does not reach 99\.00 dB even at quality 100", line)
    missing = dataclasses.replace(jpeg, format="NOSUCHFORMAT")
    line = demo.baseline_line(missing, original, 30.0, ours=1)
    assert "not compared: this Pillow cannot write it" in line


# ---------------------------------------------------------------- warnings


@pytest.fixture
def grey_with_rgb_profile(photo: Path) -> Path:
    """A PNG file whose profile is not one of its pixels; the photo itself is removed."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = photo.with_name("grey.png")
    Image.open(photo).convert("L").save(path, icc_profile=srgb)
    photo.unlink()
    return path


@pytest.mark.parametrize("many", [False, True])
def test_ignored_profile_is_a_warning_of_one_line(
    grey_with_rgb_profile: Path, model_dir: str, many: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grey_with_rgb_profile
    for folder in ("b", "c"):
        (path.parent / folder).mkdir()
        shutil.copy(path, path.parent / folder)
    use = ["--model", model_dir, "--force", *(["--jobs", "2"] if many else [])]
    args = ["encode", str(path.parent if many else path), *use]
    assert main(args) == 0
    warned = sorted(path.parent.rglob("*.png")) if many else [path]
    ignored = "has a colour profile that cannot be applied; it is ignored"
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [f"cmamba: warning: {one} {ignored}" for one in warned]
    for file in path.parent.rglob("*.cmb"):
        file.unlink()
    assert main([*args, "--strict-color"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warned)
    assert all(line.startswith("cmamba: error: ") for line in lines)
    assert not list(path.parent.rglob("*.cmb"))


@pytest.mark.parametrize("many", [False, True])
def test_library_warnings_are_lines_of_our_own(
    photo: Path, model_dir: str, many: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow's about EXIF data, which it raises several times: each once, without its source."""
    entry = struct.pack(">HHI", 0x0112, 3, 2**31)  # an orientation of 4 GB
    path = photo.with_name("a.jpg")
    Image.open(photo).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1" + entry + b"\0\0\0\x08")
    photo.unlink()
    use = ["--model", model_dir, "--jobs", "1"]
    assert main(["encode", str(path.parent if many else path), *use]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert f"cmamba: warning: {path}: Tag data larger than file. Skipping tag 274" in lines
    assert all(line.startswith(f"cmamba: warning: {path}: ") for line in lines)
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("many", [False, True])
def test_output_of_native_libraries_is_dropped(
    photo: Path, model_dir: str, many: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """libtiff prints to the process's stderr, past Python, what it finds wrong."""
    path = photo.with_name("a.tif")
    Image.open(photo).save(path, compression="tiff_lzw")
    photo.unlink()
    data = bytearray(path.read_bytes())
    data[400:-400] = bytes(len(data) - 800)
    path.write_bytes(data)
    with Image.open(path) as image, pytest.raises(OSError):
        image.load()
    assert "code" in capfd.readouterr().err
    args = ["encode", str(path.parent if many else path), "--model", model_dir, "--jobs", "1"]
    assert main(args) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("cmamba: ") for line in lines)


@pytest.mark.parametrize("many", [False, True])
def test_damaged_and_deep_images_are_encoded_if_asked_for(
    photo: Path, model: CMamba, model_dir: str, many: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    deep, cut = photo.with_name("deep.png"), photo.with_name("cut.png")
    Image.fromarray(np.asarray(Image.open(photo).convert("L"), np.uint16) * 257).save(deep)
    cut.write_bytes(photo.read_bytes()[:-100])
    photo.unlink()
    runs = [["encode", str(photo.parent), "--jobs", "1"]] if many else []
    runs = runs or [["encode", str(path)] for path in (deep, cut)]
    assert all(main([*args, "--model", model_dir]) == 1 for args in runs)
    assert "or convert it here with --convert" in capsys.readouterr().err
    asked_for = ["--model", model_dir, "--convert", "--lenient"]
    assert all(main([*args, *asked_for]) == 0 for args in runs)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"cmamba: warning: {cut} is damaged or truncated")
    expected = cmamba_ref.encode(read_image(deep, convert=True), model)
    assert deep.with_suffix(".cmb").read_bytes() == expected
    assert cut.with_suffix(".cmb").exists()


# ---------------------------------------------------------------- as a program


def test_runs_as_a_program(encoded: Path, model_dir: str) -> None:
    """In processes of their own: success, and an error without a traceback."""
    args = ("decode", "photo.cmb", "--model", model_dir)
    refused = run(*args, cwd=encoded.parent)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"cmamba: error: `-o` must not exist yet, .*\n", refused.stderr)
    decoded = run(*args, "-o", "back.png", cwd=encoded.parent)
    assert (decoded.returncode, decoded.stderr) == (0, "")
    assert read_image(encoded.with_name("back.png")).shape == (HEIGHT, WIDTH, 3)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cmamba {cmamba_ref.__version__}\n"


def test_help_states_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["encode", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"1 (small) to 8 (good), also in between, such as 3.5 (default: {DEFAULT_QUALITY:g})"
        in text
    )
    assert f"(default: {codec.DEFAULT_MODEL}; tiny-msssim is bundled too)" in text
    assert f"(default: {codec.DEFAULT_MAX_PIXELS // 1_000_000} million)" in text


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("switches", "chosen", "expected"),
    [(12, None, 2), (310, None, 1), (310, "2", 2), (99, None, 2), (101, None, 1)],
)
def test_busy_cores_leave_one_thread(
    monkeypatch: pytest.MonkeyPatch,
    model_dir: str,
    switches: int,
    chosen: str | None,
    expected: int,
) -> None:
    """After two seconds of CPU time, by the involuntary context switches until then."""
    usage = SimpleNamespace(ru_utime=1.5, ru_stime=0.5, ru_nivcsw=switches)
    monkeypatch.setattr(
        threads, "resource", SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=0)
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        commands.load_model(model_dir, "cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_where_nobody_can_tell_all_threads_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "resource", None)
    assert not threads.cores_are_busy()
