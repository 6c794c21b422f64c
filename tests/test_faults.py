"""Faults around the codec: full disks, signals, missing parts, exhausted memory.

A fault costs one line and an exit code; the file that was there stays whole, and nothing half
written gets its name. The table in docs/reliability.md says which test holds which fault.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from codec_helpers import make_image, random_model, run_python, start_cmamba

import cmamba_ref
from cmamba_ref.cli import batch, main
from cmamba_ref.codec.output import png_bytes

PIXELS = make_image(70, 90)
NOT_FOR_ROOT = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="modes do not bind the superuser"
)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photo.png").write_bytes(png_bytes(PIXELS))
    return tmp_path / "photo.png"


@pytest.fixture
def encoded(tmp_path: Path, model_dir: str) -> Path:
    path = tmp_path / "photo.cmb"
    path.write_bytes(cmamba_ref.encode(PIXELS, random_model()))
    return path


class Task(NamedTuple):
    """A command that replaces a file."""

    command: str
    arguments: list[str]
    target: Path


@pytest.fixture(params=["encode", "decode"])
def task(request, photo: Path, encoded: Path, model_dir: str) -> Task:
    command = request.param
    source, target = (photo, encoded) if command == "encode" else (encoded, photo)
    return Task(command, [command, str(source), "--model", model_dir, "--force"], target)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that was printed."""
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("cmamba: error: ")
    return line.removeprefix("cmamba: error: ")


# ---------------------------------------------------------------- disks


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system itself refuses in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("missing", ["all", "half", "one byte"])
def test_no_room_for_the_whole_file(task, capsys, missing):
    task.target.write_bytes(b"older")
    data = cmamba_ref.encode(PIXELS, random_model())
    if task.command == "decode":
        data = png_bytes(cmamba_ref.decode(data, random_model()))
    size = len(data)
    before = contents(task.target.parent)
    with room_for({"all": 0, "half": size // 2, "one byte": size - 1}[missing]):
        assert main(task.arguments) == 1
    assert "File too large" in error_line(capsys)
    assert contents(task.target.parent) == before
    with room_for(size):
        assert main(task.arguments) == 0
    assert task.target.read_bytes() == data


def test_no_room_for_one_of_many(tmp_path, model_dir, capsys):
    """The large one fails and is named; the small one is written."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "large.png").write_bytes(png_bytes(make_image(200, 200)))
    (folder / "small.png").write_bytes(png_bytes(make_image(8, 8)))
    limit = len(cmamba_ref.encode(make_image(8, 8), random_model()))
    arguments = ["encode", str(folder), "-o", str(tmp_path / "out"), "--model", model_dir]
    with room_for(limit):
        assert main([*arguments, "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"cmamba: error: {folder / 'large.png'}: ") and "File too large" in err
    assert out.startswith("encoded 1\nskipped 0\nfailed 1\n")
    assert list(contents(tmp_path / "out")) == ["small.cmb"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_without_room(photo, model_dir):
    command = ["-m", "cmamba_ref", "encode", str(photo), "-o", "-", "--model", model_dir]
    with open("/dev/full", "wb") as full:
        done = run_python(*command, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "cmamba: error: standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system without files")
def test_a_folder_that_takes_no_files(photo, model_dir, capsys):
    assert main(["encode", str(photo), "-o", "/proc/self/photo.cmb", "--model", model_dir]) == 1
    assert error_line(capsys).startswith("/proc/self/photo.cmb: ")


@NOT_FOR_ROOT
def test_a_folder_that_may_not_be_written(photo, encoded, model_dir, capsys):
    before = contents(photo.parent)
    photo.parent.chmod(0o500)
    try:
        assert main(["encode", str(photo), "--model", model_dir, "--force"]) == 1
        assert "Permission denied" in error_line(capsys)
    finally:
        photo.parent.chmod(0o700)
    assert contents(photo.parent) == before


# ---------------------------------------------------------------- signals

# A process that is at the end of a write when the signal comes: all bytes are in the temporary
# file, which has not got its name.
WRITE = """
import importlib, os, signal, sys
from pathlib import Path
from cmamba_ref.atomic_write import write_atomically

cli = importlib.import_module("cmamba_ref.cli.commands")

def main():
    number = getattr(signal, sys.argv[2])
    write_atomically(sys.argv[1], b"newer", lambda path: os.kill(os.getpid(), number))

cli.main = main
cli.run()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_signal_at_the_end_of_a_write(tmp_path, name):
    target = tmp_path / "photo.cmb"
    target.write_bytes(b"older")
    assert run_python("-c", WRITE, str(target), name).returncode != 0
    left = contents(tmp_path)
    assert left.pop("photo.cmb") == b"older"
    temporary = [(n.startswith(".cmamba-"), n.endswith(".tmp")) for n in left]
    assert temporary == ([(True, True)] if name == "SIGKILL" else [])


def test_a_temporary_file_of_a_killed_process_is_ignored(photo, encoded, model_dir, capsys):
    left = photo.parent / ".cmamba-0123456789abcdef.tmp"
    left.write_bytes(encoded.read_bytes()[:50])
    for command, source in (("encode", photo), ("decode", encoded), ("verify", encoded)):
        found = batch.find([photo.parent], command)
        assert [path for path, _ in found.files] == [source]
    assert main(["encode", str(photo), "--model", model_dir, "--force"]) == 0
    assert left.read_bytes() == encoded.read_bytes()[:50]


# The command itself; it gets the signal when it comes to a stage.
AT_STAGE = """
import contextlib, importlib, os, signal, sys

cli = importlib.import_module("cmamba_ref.cli.commands")
number, moment = getattr(signal, sys.argv.pop(1)), sys.argv.pop(1)

@contextlib.contextmanager
def stages(count):
    def begin(stage):
        if stage == moment:
            os.kill(os.getpid(), number)
    yield begin

cli._stages = stages
cli.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reading", "loading the model", "coding", "writing"])
def test_a_command_that_gets_a_signal(task, stage):
    before = contents(task.target.parent)
    stage = f"{task.command.removesuffix('e')}ing" if stage == "coding" else stage
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)):
        done = run_python("-c", AT_STAGE, name, stage, *task.arguments)
        message = "cmamba: interrupted\n" if name == "SIGINT" else ""
        assert (done.returncode, done.stderr) == (code, message)
        assert contents(task.target.parent) == before


def start_batch(folder: Path, count: int, model_dir: str) -> subprocess.Popen[str]:
    """A command that encodes so many images that differ, when it has written its first file."""
    images, out = folder / "in", folder / "out"
    images.mkdir()
    for i in range(count):
        (images / f"{i}.png").write_bytes(png_bytes(make_image(256, 256, seed=i)))
    command = ["encode", str(images), "-o", str(out), "--model", model_dir, "--jobs", "2"]
    process = start_cmamba(*command)
    while process.poll() is None and not (out.is_dir() and any(out.glob("*.cmb"))):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes at work for it; not the one in which Python keeps account of semaphores."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [p for p in map(int, pids) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_of_a_batch_costs_no_file(tmp_path, model_dir):
    """Another process does its file again."""
    process = start_batch(tmp_path, 40, model_dir)
    os.kill(children(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("encoded 40\nskipped 0\nfailed 0\n")
    model = random_model()
    for path in (tmp_path / "out").glob("*.cmb"):
        cmamba_ref.decode(path.read_bytes(), model)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_batch_that_is_ended_leaves_whole_files_and_no_process(tmp_path, model_dir, number):
    process = start_batch(tmp_path, 200, model_dir)
    workers = children(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    model = random_model()
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".cmb":
            cmamba_ref.decode(path.read_bytes(), model)
        else:
            assert number == signal.SIGKILL and path.name.startswith(".cmamba-")


# ---------------------------------------------------------------- missing parts


def test_a_missing_triton_is_named(photo, encoded, model_dir, capsys, monkeypatch):
    before = contents(photo.parent)
    monkeypatch.setenv("CMAMBA_SCAN_BACKEND", "triton")
    monkeypatch.setitem(sys.modules, "cmamba_ref.kernels", None)
    assert main(["encode", str(photo), "--model", model_dir, "--force"]) == 1
    assert "got 'triton'" in (line := error_line(capsys)) and "use backend='auto'" in line
    assert contents(photo.parent) == before


# ---------------------------------------------------------------- memory


@pytest.fixture
def full_gpu(encoded, monkeypatch):
    """From here on the transforms fail as they do on a GPU whose memory is taken."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")

    monkeypatch.setattr(cmamba_ref.CMamba, "_analyse", fail)
    monkeypatch.setattr(cmamba_ref.CMamba, "decode_latent", fail)


@pytest.mark.usefixtures("full_gpu")
def test_a_gpu_without_memory(task, capsys):
    before = contents(task.target.parent)
    assert main(task.arguments) == 1
    line = error_line(capsys)
    assert "not enough memory" in line and "another --device" in line
    assert contents(task.target.parent) == before


@pytest.mark.usefixtures("full_gpu")
def test_a_file_is_not_called_bad_for_want_of_gpu_memory(encoded, model_dir, capsys):
    assert main(["verify", str(encoded), "--model", model_dir]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"not checked: {encoded}: not enough memory")
    assert out.endswith("good 0, bad 0, not checked 1\n")


# ---------------------------------------------------------------- input that goes away


def test_an_image_that_vanishes_before_its_turn(tmp_path, model_dir, capsys, monkeypatch):
    """Between the search of the folder and the work on it; the others are encoded."""
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png_bytes(PIXELS))
    find = batch.find

    def find_and_lose(*arguments):
        found = find(*arguments)
        (tmp_path / "a.png").unlink()
        return found

    monkeypatch.setattr(batch, "find", find_and_lose)
    assert main(["encode", str(tmp_path), "--model", model_dir, "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    assert err == f"cmamba: error: {tmp_path / 'a.png'}: No such file or directory\n"
    assert out.startswith("encoded 1\nskipped 0\nfailed 1\n")
