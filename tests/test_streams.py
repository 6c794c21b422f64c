"""`-` on the command line: bytes through standard input and output, words to standard error."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from codec_helpers import ENVIRONMENT, make_image
from PIL import Image

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.cli import main, stdio
from cmamba_ref.codec.output import png_bytes

IMAGE = make_image(70, 90)


@pytest.fixture(scope="module")
def data(model_dir: str) -> bytes:
    return cmamba_ref.encode(IMAGE, CMamba.from_pretrained(model_dir))


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("output", [[], ["-o", "-"]])
def test_encode_and_decode_from_stdin_to_stdout(
    model_dir: str,
    data: bytes,
    output: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    """Without -o, what came from standard input goes to standard output."""
    feed(monkeypatch, png_bytes(IMAGE))
    assert main(["encode", "-", *output, "--model", model_dir, "--verify"]) == 0
    out, err = capsysbinary.readouterr()
    assert out == data
    assert err.startswith(b"standard output: %d bytes, " % len(data))

    feed(monkeypatch, data)
    assert main(["decode", "-", *output, "--model", model_dir]) == 0
    out, err = capsysbinary.readouterr()
    with Image.open(io.BytesIO(out)) as decoded:
        assert decoded.format == "PNG"
        expected = cmamba_ref.decode(data, CMamba.from_pretrained(model_dir))
        np.testing.assert_array_equal(np.asarray(decoded), expected)
    assert err.startswith(b"standard output: 90x70 RGB, decoded in ")


def test_files_and_streams_mixed(
    tmp_path: Path,
    model_dir: str,
    data: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    path, target = tmp_path / "a.png", tmp_path / "a.cmb"
    path.write_bytes(png_bytes(IMAGE))
    assert main(["encode", str(path), "-o", "-", "--model", model_dir]) == 0
    assert capsysbinary.readouterr().out == data
    assert not target.exists()
    feed(monkeypatch, path.read_bytes())
    assert main(["encode", "-", "-o", str(target), "--model", model_dir]) == 0
    out, err = capsysbinary.readouterr()
    assert out.startswith(os.fsencode(target)) and err == b""
    assert target.read_bytes() == data


def test_info_of_stdin(
    data: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, data)
    assert main(["info", "-"]) == 0
    assert capsys.readouterr().out.startswith("standard input\n  format    version 1, checksum")
    feed(monkeypatch, data[:-1])
    assert main(["info", "-"]) == 1
    assert "error: standard input: the file is truncated" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_errors_name_standard_input(
    model_dir: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    """And nothing reaches standard output."""
    feed(monkeypatch, b"")
    assert main([command, "-", "--model", model_dir]) == 1
    out, err = capsysbinary.readouterr()
    assert out == b""
    assert err.startswith(b"cmamba: error: standard input")


def test_a_terminal_gets_no_binary_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before the input, which does not exist, is looked for."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for command in ("encode", "decode"):
        assert main([command, str(tmp_path / "missing"), "-o", "-", "--force"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "`-o` must not be a terminal, which cannot show binary data, got -; " in err


def test_terminal_is_refused_as_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for command in ("encode", "decode", "info"):
        assert main([command, "-"]) == 2
        assert "got a terminal; redirect it, as in < photo.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["encode", "-", "a.png"],
        ["decode", "a.cmb", "-"],
        ["decode", "a.cmb", "b.cmb", "-o", "-"],
        ["verify", "-"],
        ["encode", "-", "-o", "./"],
    ],
)
def test_streams_cannot_be_mixed_with_files(
    tmp_path: Path,
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and ("got -; " in err or "where IN is -" in err)
    assert list(tmp_path.iterdir()) == []


def test_file_named_dash_is_reachable(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(data)
    assert main(["info", "./-"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / '-'}\n")
    assert stdio.parse_path("-") == stdio.STREAM == Path("-")


def test_programs_in_a_pipe(tmp_path: Path, model_dir: str, data: bytes) -> None:
    """Real pipes: not a byte too many, and a reader that leaves early is told in one line."""
    command = [sys.executable, "-m", "cmamba_ref", "encode", "-", "--model", model_dir]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "cwd": tmp_path,
        # Empty, PYTHONUNBUFFERED is as good as not set.
        "env": os.environ
        | {"PYTHONPATH": str(Path(cmamba_ref.__file__).parents[1]), "PYTHONUNBUFFERED": ""},
    }
    with (
        subprocess.Popen(command, **pipes) as whole,
        subprocess.Popen(command, **pipes) as cut,
    ):
        assert cut.stdout is not None
        cut.stdout.close()
        cut.stdout = None
        out, _ = whole.communicate(png_bytes(IMAGE))
        # Small enough to wait in a buffer, which is emptied once more when the process ends.
        _, err = cut.communicate(png_bytes(IMAGE[:1, :1]))
    assert (whole.returncode, out) == (0, data)
    assert (cut.returncode, err.splitlines()) == (
        1,
        [b"cmamba: error: standard output: Broken pipe"],
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_lose_nothing(tmp_path: Path, model_dir: str, data: bytes) -> None:
    """The command works, or says why not; what is printed never gets into a file."""
    (tmp_path / "a.png").write_bytes(png_bytes(IMAGE))
    (tmp_path / "a.cmb").write_bytes(data)

    def run(arguments: str, redirection: str) -> tuple[int, bytes, bytes]:
        line = f"{sys.executable} -m cmamba_ref {arguments} {redirection}"
        environment = ENVIRONMENT | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True
        )
        return done.returncode, done.stdout, done.stderr

    encode = f"encode a.png --force --model {model_dir}"
    assert run(f"{encode} -o - --verify", "2>&- <&-") == (0, data, b"")
    assert run(f"{encode} -o - --verify", "2<a.png") == (0, data, b"")  # open, and not for writing
    code, out, _ = run(f"{encode} -o b.cmb", "2>&- <&-")
    assert (code, out[:6], (tmp_path / "b.cmb").read_bytes()) == (0, b"b.cmb:", data)
    assert run("encode missing.png", "2>&-") == (1, b"", b"")
    assert run("encode -", "<&-") == (
        *(1, b""),
        b"cmamba: error: standard input: Bad file descriptor\n",
    )
    code, out, _ = run(f"verify a.cmb a.png --jobs 2 --model {model_dir}", "2>&- <&-")
    assert (code, out.splitlines()[-1]) == (1, b"good 1, bad 1, not checked 0")
    lost = b"cmamba: error: standard output: Bad file descriptor\n"
    assert run(f"{encode} -o c.cmb", ">&-") == (1, b"", lost)
    assert (tmp_path / "c.cmb").read_bytes() == data
    assert run("info a.cmb", ">&-") == (1, b"", lost)
    if Path("/dev/full").exists():
        full = b"cmamba: error: standard output: No space left on device\n"
        assert run("info a.cmb", "> /dev/full") == (1, b"", full)
