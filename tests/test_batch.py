"""Many files at once: what becomes of each, and that no one of them stops the others."""

import errno
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pool_helpers
import pytest
import torch
from codec_helpers import make_image, random_model
from PIL import Image

import cmamba_ref
from cmamba_ref import CMamba, codec
from cmamba_ref.cli import batch, main, process_pool
from cmamba_ref.codec import formats
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.files import DecodeOptions
from cmamba_ref.codec.images import read_image


@pytest.fixture(scope="module")
def model(model_dir: str) -> CMamba:
    return CMamba.from_pretrained(model_dir)


def save(path: Path, height: int = 64, width: int = 64, seed: int = 0, grey: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = make_image(height, width, seed)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of three images, one of them deeper, and of what is no image or hidden."""
    folder = tmp_path / "album"
    save(folder / "a.png", 70, 90)
    save(folder / "x" / "y" / "b.PNG", 64, 65, grey=True)
    save(folder / "x" / "c.d.jpg", 33, 64)
    (folder / "notes.txt").write_text("no image")
    save(folder / ".hidden.png")
    save(folder / ".thumbnails" / "a.png")
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What followed `cmamba: error: ` on the only line that was printed."""
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("cmamba: error: ")


# ---------------------------------------------------------------- folders


def test_folder_and_single_file_give_equal_output(
    album: Path,
    model: CMamba,
    model_dir: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A quarter of a second from one look to the next: of a few hundredths, the two digits that are
    # printed are too few to compute the speed from.
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.25).__next__)
    monkeypatch.setattr(batch, "time", clock)
    out, back = album.with_name("new") / "cmb", album.with_name("back")
    options = ["--model", model_dir, "--jobs", "1"]
    assert main(["encode", str(album), "-o", str(out), "--quality", "2.5", *options]) == 0
    printed, errors = capsys.readouterr()
    sources = [album / "a.png", album / "x" / "c.d.jpg", album / "x" / "y" / "b.PNG"]
    assert contents(out) == {
        name: cmamba_ref.encode(read_image(source), model, 2.5)
        for name, source in zip(["a.cmb", "x/c.d.cmb", "x/y/b.cmb"], sources, strict=True)
    }
    assert errors == ""

    bytes_in = sum(source.stat().st_size for source in sources)
    bytes_out = sum(map(len, contents(out).values()))
    pixels = 70 * 90 + 33 * 64 + 64 * 65
    *lines, speed = printed.splitlines()
    assert lines == [
        "encoded 3",
        "skipped 0",
        "failed 0",
        "left out: 1 (.txt 1)",
        f"{bytes_in} bytes in, {bytes_out} bytes out, {8 * bytes_out / pixels:.3f} bpp",
    ]
    found = re.fullmatch(r"0\.01 megapixels in ([\d.]+) s, ([\d.]+) megapixels/s", speed)
    assert found is not None, speed
    assert float(found[2]) == pytest.approx(pixels / 1e6 / float(found[1]), abs=0.01)

    assert main(["decode", str(out), "-o", str(back), *options]) == 0
    printed = capsys.readouterr().out
    assert tree(back) == ["a.png", "x/c.d.png", "x/y/b.png"]
    for name, data in contents(out).items():
        decoded = read_image((back / name).with_suffix(".png"))
        np.testing.assert_array_equal(decoded, cmamba_ref.decode(data, model))
    size = sum(map(len, contents(back).values()))
    assert printed.startswith("decoded 3\n")
    assert f"{bytes_out} bytes in, {size} bytes out, {8 * bytes_out / pixels:.3f} bpp" in printed


def test_default_output_is_beside_the_input(album: Path, model_dir: str) -> None:
    before = tree(album)
    assert main(["encode", str(album), "--model", model_dir, "--jobs", "1"]) == 0
    assert tree(album) == sorted([*before, "a.cmb", "x/c.d.cmb", "x/y/b.cmb"])


def test_files_and_folders_can_be_mixed(album: Path, tmp_path: Path, model_dir: str) -> None:
    """Also an input that is named twice."""
    alone, out = save(tmp_path / "alone" / "z.png"), tmp_path / "out"
    inputs = [str(alone), str(album), str(album / "a.png")]
    assert main(["encode", *inputs, "-o", str(out), "--model", model_dir, "--jobs", "1"]) == 0
    assert tree(out) == ["a.cmb", "x/c.d.cmb", "x/y/b.cmb", "z.cmb"]


def test_two_processes_write_equal_files_and_continue_after_a_bad_file(
    album: Path, tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "b.png").write_bytes(b"damaged")
    for jobs in ("1", "2"):
        args = ["encode", str(album), "-o", str(tmp_path / jobs), "--jobs", jobs]
        assert main([*args, "--model", model_dir]) == 1
        out, err = capsys.readouterr()
        bad = album / "b.png"
        assert err == f"cmamba: error: {bad} is no image in a format that Pillow reads\n"
        assert out.startswith(f"encoded 3\nskipped 0\nfailed 1\n  {bad}\n")
    assert len(contents(tmp_path / "1")) == 3
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert multiprocessing.active_children() == []


def test_every_file_that_fails_is_named(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file, no .cmb file, and an output that is in the way."""
    good = save(tmp_path / "good.png")
    assert main(["encode", str(good), "--model", model_dir]) == 0
    good.unlink()
    (tmp_path / "bad.cmb").write_bytes(b"bad")
    (tmp_path / "late.cmb").write_bytes((tmp_path / "good.cmb").read_bytes())
    (tmp_path / "late.png").mkdir()
    names = ["missing.cmb", "bad.cmb", "late.cmb", "good.cmb"]
    capsys.readouterr()
    args = ["decode", *(str(tmp_path / name) for name in names), "--jobs", "1"]
    assert main([*args, "--model", model_dir]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    for name, line in zip(names[:3], lines, strict=True):
        assert line.startswith(f"cmamba: error: {tmp_path / name}: ")
    assert lines[0].endswith("missing.cmb: No such file or directory")
    assert "the output must be a file, and another one" in lines[2]
    assert lines[2].endswith(f"got {str(tmp_path / 'late.png')!r}")
    failed = "".join(f"  {tmp_path / name}\n" for name in sorted(names[:3]))
    assert out.startswith(f"decoded 1\nskipped 0\nfailed 3\n{failed}")
    assert (tmp_path / "good.png").is_file()


def test_second_run_skips_finished_files(
    album: Path, tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["encode", str(album), "-o", str(out), "--model", model_dir, "--jobs", "1"]
    assert main(args) == 0
    first = contents(out)
    (out / "x" / "c.d.cmb").unlink()
    (out / "a.cmb").write_bytes(b"old")
    capsys.readouterr()
    assert main(args) == 0
    skipped = "skipped 2 that exist already; --force replaces them"
    assert capsys.readouterr().out.startswith(f"encoded 1\n{skipped}\nfailed 0\n")
    assert contents(out) == first | {"a.cmb": b"old"}
    assert main([*args, "--force"]) == 0
    assert contents(out) == first
    capsys.readouterr()
    assert main(args) == 0
    skipped = skipped.replace("2", "3")
    left_out = "left out: 1 (.txt 1)"
    assert capsys.readouterr().out == f"encoded 0\n{skipped}\nfailed 0\n{left_out}\n"


# ---------------------------------------------------------------- refused before the work


def refused(
    args: list[str], capsys: pytest.CaptureFixture[str], folder: Path, code: int = 1
) -> str:
    before = contents(folder)
    assert main(args) == code
    assert contents(folder) == before
    return error_line(capsys)


def test_a_name_clash_fails_alone(
    album: Path, tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both files are named, and the others are encoded."""
    first, second = album / "a.png", save(album / "a.jpg")
    assert main(["encode", str(album), "--model", model_dir, "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    output = f"its output {str(album / 'a.cmb')!r} is that of"
    assert err.splitlines() == [
        f"cmamba: error: {one}: {output} {str(other)!r} too; rename one of them"
        for one, other in ((second, first), (first, second))
    ]
    assert out.startswith(f"encoded 2\nskipped 0\nfailed 2\n  {second}\n  {first}\n")
    assert not (album / "a.cmb").exists()
    args = ["encode", str(first), str(save(tmp_path / "other" / "a.png"))]
    assert main([*args, "-o", str(tmp_path / "out"), "--model", model_dir]) == 1
    assert capsys.readouterr().err.count("is that of") == 2


def test_an_output_equal_to_an_input_fails_alone(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image whose name says that it is a .cmb file already."""
    first, second = save(tmp_path / "a.png"), tmp_path / "b.cmb"
    second.write_bytes(image := first.read_bytes())
    args = ["encode", str(first), str(second), "--force", "--model", model_dir, "--jobs", "1"]
    assert main([*args, "-o", str(tmp_path)]) == 1
    assert f"{second}: its output {str(second)!r} would replace the input" in (
        capsys.readouterr().err
    )
    assert second.read_bytes() == image and (tmp_path / "a.cmb").is_file()


def test_an_unreadable_folder_fails_alone(
    album: Path,
    model_dir: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For every command; faked, since modes do not bind root."""
    locked, scandir = str(album / "x"), os.scandir

    def scan(path: str | os.PathLike) -> object:
        if os.fspath(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    options = ["--model", model_dir, "--jobs", "1"]
    for command in ("encode", "decode", "verify", "info"):
        args = [command, str(album), *([] if command == "info" else options)]
        assert main([*args, "--force"] if command in ("encode", "decode") else args) == 1
        out, err = capsys.readouterr()
        assert f"{locked}: Permission denied\n" in (out if command == "verify" else err)
        assert {
            "encode": f"encoded 1\nskipped 0\nfailed 1\n  {locked}\n",
            "decode": f"decoded 1\nskipped 0\nfailed 1\n  {locked}\n",
            "verify": "good 1, bad 0, not checked 1",
            "info": "a.cmb\n  format",
        }[command] in out


def test_output_of_a_batch_must_be_a_folder(
    album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["encode", str(album), "-o", str(album / "notes.txt")]
    assert "`-o` must be a folder" in refused(args, capsys, album, code=2)


def test_what_a_folder_leaves_out_is_counted(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every format that Pillow decodes the files are taken; own output is not mentioned."""
    import cmamba_ref.pillow_plugin  # noqa: F401  registers .cmb, which is no image to encode

    save(tmp_path / "a.sgi")
    save(tmp_path / "b.ICO")
    for name in ("1.heic", "2.HEIC", "3.mov", "4.mpg", "noname", "old.cmb", ".hidden.mov"):
        (tmp_path / name).touch()
    options = ["--model", model_dir, "--jobs", "1"]
    assert main(["encode", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("encoded 2\n")
    line = "left out: 5 (.heic 2, .mov 1, .mpg 1, no suffix 1); HEIC needs pillow-heif"
    assert f"{line} (pip install pillow-heif)\n" in out
    (tmp_path / "old.cmb").unlink()
    assert main(["verify", str(tmp_path), *options]) == 0
    assert "left out: 7 (.heic 2, " in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_a_folder_is_left_out(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading it would wait for ever, xyb3rt/sxiv#252; one that is named is read."""
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert batch.find([tmp_path], "encode").left_out == {"no regular file": 1}
    assert main(["encode", str(tmp_path), "--model", model_dir, "--jobs", "1"]) == 0
    assert "left out: 1 (no regular file 1)" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="needs such file names")
def test_control_characters_in_warnings_are_escaped(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save(tmp_path / "album" / "two  spaces\x1b[2J.png")
    data = image.read_bytes()
    image.write_bytes(data[: len(data) * 3 // 4])
    (image.parent / "a.\x1b[2J").touch()
    args = ["encode", str(image.parent), "--model", model_dir, "--jobs", "1"]
    assert main(args) == 1  # without --lenient
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "left out: 1 (.\\x1b[2j 1)" in out
    assert err.count("spaces\\x1b[2J.png") == 1
    assert main([*args, "--lenient"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("cmamba: warning: ") and "\x1b" not in out + err
    assert err.count("spaces\\x1b[2J.png") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs such file names")
def test_control_characters_in_names_are_escaped(
    tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file keeps one line, and moves no cursor: shutter-project/shutter#743."""
    image = save(tmp_path / "new\nline\x1b[31m.png")
    options = ["--model", model_dir, "--jobs", "1"]
    shown = f"{tmp_path}/new\\nline\\x1b[31m"
    assert main(["encode", str(image), *options]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}.cmb: ")
    encoded, missing = str(image.with_suffix(".cmb")), str(tmp_path / "a\nb.cmb")
    assert main(["verify", encoded, missing, *options]) == 1
    good, unchecked, _ = capsys.readouterr().out.splitlines()
    assert good.startswith(f"good: {shown}.cmb: ")
    assert unchecked == f"not checked: {tmp_path}/a\\nb.cmb: No such file or directory"
    assert main(["info", encoded]) == 0
    assert capsys.readouterr().out.startswith(f"{shown}.cmb\n")
    Path(encoded).write_bytes(b"damaged")
    assert main(["decode", encoded, missing, "--force", *options]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 2 and err.startswith(f"cmamba: error: {shown}.cmb: ")
    assert f"  {tmp_path}/a\\nb.cmb\n  {shown}.cmb\n" in out


def test_a_package_for_heic_is_used(
    tmp_path: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If it is installed; without it, the error names it."""
    start = b"\0\0\0\x18ftypheic"
    path = tmp_path / "a.heic"
    path.write_bytes(start)
    args = ["encode", str(path), "--model", model_dir]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.register_heif.cache_clear()
    assert main(args) == 1
    assert error_line(capsys).endswith("; HEIC needs pillow-heif (pip install pillow-heif)")

    def register() -> None:
        opener = lambda file, name: Image.new("RGB", (8, 8))  # noqa: E731
        monkeypatch.setitem(Image.OPEN, "HEIF", (opener, lambda prefix: prefix[4:8] == b"ftyp"))
        monkeypatch.setattr(Image, "ID", ["HEIF", *Image.ID])
        monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")

    package = SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    formats.register_heif.cache_clear()
    assert main(["encode", str(tmp_path), "--model", model_dir]) == 0
    assert capsys.readouterr().out.startswith("encoded 1\n")
    formats.register_heif.cache_clear()


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_empty_folder_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([command, str(tmp_path)], capsys, tmp_path)
    expected = f"`IN` must hold files to {command}, got {str(tmp_path)!r}; "
    assert message == expected + "there are none"
    (tmp_path / "notes.TXT").touch()
    assert refused([command, str(tmp_path)], capsys, tmp_path) == (
        expected + "left out: 1 (.txt 1)"
    )


@pytest.mark.parametrize("jobs", ["0", "-1", "1.5", "many"])
def test_jobs_must_be_a_number(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["encode", "a.png", "b.png", f"--jobs={jobs}"])
    assert caught.value.code == 2
    assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_several_processes_need_the_cpu(album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["encode", str(album), "--device", "meta"]
    message = refused([*args, "--jobs", "2"], capsys, album, 2)
    assert message == "`--jobs` must be 1 with --device meta, got 2; leave it out"
    # Without --jobs the work begins, in this process, and there is no such device.
    assert "`device` must be one" in refused(args, capsys, album, 2)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_fatal_error_is_reported_once(
    album: Path, model_dir: str, jobs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["encode", str(album), "--jobs", jobs, "--model", model_dir, "--quality", "9"]
    assert "`quality` must be a number from 1 to 8" in refused(args, capsys, album, 2)
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------- trouble on the way


def test_internal_error_logs_its_traceback(
    album: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = codec.encode

    def encode(image: np.ndarray, model: CMamba, *args: float, **options: int) -> bytes:
        if image.ndim == 2:
            raise KeyError("a mistake")
        return right(image, model, *args, **options)

    monkeypatch.setattr(codec, "encode", encode)
    assert main(["encode", str(album), "--model", model_dir, "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    grey = album / "x" / "y" / "b.PNG"
    assert err == f"cmamba: error: {grey}: KeyError: 'a mistake'\n"
    assert out.startswith("encoded 2\n")
    (record,) = caplog.records
    assert record.exc_info is not None and record.getMessage() == str(grey)


def test_only_the_item_that_kills_its_process_is_given_up() -> None:
    results = []
    items = ["a", "kill", "b", "c", "kill", "d"]
    process_pool.spread(
        pool_helpers.work, items, 2, pool_helpers.prepare, lambda *pair: results.append(pair)
    )
    assert sorted(results, key=str) == sorted(
        [(item, None if item == "kill" else item.upper()) for item in items], key=str
    )
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("library", ["concurrent.futures", "loky"])
def test_pools_of_libraries_lose_the_items_that_wait_when_a_process_dies(library: str) -> None:
    """Why `process_pool` is more than such a pool: of this list it gives up one item."""
    pools = pytest.importorskip(library, reason=f"{library} is not installed")
    make = pools.ProcessPoolExecutor
    if library == "concurrent.futures":  # loky starts processes anew by itself
        make = partial(make, mp_context=multiprocessing.get_context("spawn"))
    with make(1) as pool:
        futures = [pool.submit(pool_helpers.work, item) for item in ["kill", "a", "b", "c"]]
        errors = [future.exception(timeout=60) for future in futures]
    assert all(isinstance(error, BrokenProcessPool) for error in errors)


def test_a_file_whose_process_died_is_reported(
    album: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spread(work, tasks, processes, prepare, report) -> None:
        for task in tasks:
            report(task, None)

    monkeypatch.setattr(process_pool, "spread", spread)
    assert main(["encode", str(album), "--jobs", "2"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == f"cmamba: error: {album / 'a.png'}: {batch.PROCESS_DIED}"
    assert out.startswith("encoded 0\nskipped 0\nfailed 3\n")


def test_an_exception_leaves_no_process() -> None:
    with pytest.raises(ValueError, match="raise"):
        process_pool.spread(
            pool_helpers.work, ["raise"] * 4, 2, pool_helpers.prepare, lambda *_: None
        )
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_ctrl_c_leaves_complete_files_and_no_process(tmp_path: Path, model_dir: str) -> None:
    """To all processes at once, as a terminal sends it."""
    source = save(tmp_path / "source.png", 128, 128)
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    for i in range(500):
        (folder / f"{i}.png").symlink_to(source)
    command = [sys.executable, "-m", "cmamba_ref", "encode", str(folder), "-o", str(out)]
    process = subprocess.Popen(
        [*command, "--model", model_dir, "--jobs", "2"],
        env=os.environ | {"PYTHONPATH": str(Path(cmamba_ref.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not any(out.glob("*.cmb")) and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert printed == ("", "cmamba: interrupted\n")
    assert process.returncode == 130
    assert 0 < len(contents(out)) < 500
    assert all(name.endswith(".cmb") for name in contents(out))
    for data in contents(out).values():
        Container.unpack(data)
    for _ in range(100):  # the resource tracker of multiprocessing ends a little later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process is left")


# ---------------------------------------------------------------- one file


def test_single_file_needs_no_batch(
    album: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = album / "one.cmb"
    args = ["encode", str(album / "a.png"), "-o", str(target), "--model", model_dir]
    assert main([*args, "--jobs", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: {target.stat().st_size} bytes, ")
    assert main(args) == 1
    assert "must not exist yet" in error_line(capsys)


# ---------------------------------------------------------------- progress


def test_progress_is_shown_on_a_terminal_only(
    album: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["encode", str(album), "--model", model_dir, "--jobs", "1", "--force"]
    assert main(args) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(args) == 0
    assert re.search(r"cmamba: \d/3 \|.*\| \S+ elapsed, \S+ left", capsys.readouterr().err)


def test_cores_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more threads than torch would take by itself, and at least one."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    job = batch.Job(random_model, DecodeOptions())
    for threads in (1, 3, 8):
        batch._prepare_here(job, threads)
    monkeypatch.setattr(batch, "_here", None)
    assert asked == [1, 3, 4]
