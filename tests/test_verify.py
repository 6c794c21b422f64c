"""`cmamba verify`, and `cmamba encode --verify`: bad files are found, and never get a name."""

from pathlib import Path

import pytest
from codec_helpers import field_of, make_image, random_model, with_field
from PIL import Image

import cmamba_ref
from cmamba_ref import CMamba, codec
from cmamba_ref.cli import main
from cmamba_ref.codec.verify import verify_encoded, verify_file
from cmamba_ref.errors import BitstreamError, ModelMismatchError

LIMITS = {"max_pixels": 10**6, "max_memory": None}


@pytest.fixture(scope="module")
def model(model_dir: str) -> CMamba:
    return CMamba.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def good(model: CMamba) -> bytes:
    return cmamba_ref.encode(make_image(70, 90), model)


@pytest.fixture(scope="module")
def wrong_symbols(good: bytes) -> bytes:
    """A file that only its symbols' check gives away: every checksum of bytes is right."""
    return with_field(good, "symbols' check", 0)


@pytest.fixture(scope="module")
def foreign() -> bytes:
    return cmamba_ref.encode(make_image(64, 64)[..., 0], random_model(seed=1))


@pytest.fixture
def shelf(tmp_path: Path, good: bytes, wrong_symbols: bytes, foreign: bytes) -> Path:
    """A folder of files of every kind, one of them deeper."""
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    (folder / "broken.cmb").write_bytes(good[:-1])
    (folder / "deep" / "good.cmb").write_bytes(good)
    (folder / "deep" / "wrong.cmb").write_bytes(wrong_symbols)
    (folder / "foreign.cmb").write_bytes(foreign)
    (folder / "notes.txt").write_text("no file of ours")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------- verify


def test_only_what_is_damaged_is_called_bad(
    tmp_path: Path, good: bytes, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a mistyped path, a newer version, or an image above the limit."""
    (tmp_path / "good.cmb").write_bytes(good)
    (tmp_path / "newer.cmb").write_bytes(good[:4] + b"\x09" + good[5:])
    (tmp_path / "photo.cmb").write_bytes(b"an image")
    paths = [str(tmp_path / f"{name}.cmb") for name in ("typo", "newer", "good", "photo")]
    options = ["--model", model_dir, "--jobs", "1", "--max-pixels", "64"]
    assert main(["verify", *paths, *options]) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert lines[0] == f"not checked: {paths[0]}: No such file or directory"
    assert lines[1].startswith(f"not checked: {paths[1]}: the file has format version 9")
    assert lines[2].startswith(f"not checked: {paths[2]}: the file declares 90x70 pixels")
    assert lines[3].startswith(f"bad: {paths[3]}: this is not a .cmb file")
    assert summary == "good 0, bad 1, not checked 3"


def test_a_folder_is_verified_file_by_file(
    shelf: Path, foreign: bytes, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(shelf)
    assert main(["verify", str(shelf), "--model", model_dir, "--jobs", "1"]) == 1
    out, err = capsys.readouterr()
    *lines, left_out, summary = out.splitlines()
    assert left_out.startswith("left out: ")
    needed = field_of(foreign, "model id").hex()
    broken, wrong, right, other = sorted(lines)
    assert broken.startswith(f"bad: {shelf / 'broken.cmb'}: the file is truncated")
    assert wrong.startswith(f"bad: {shelf / 'deep' / 'wrong.cmb'}: the decoded symbols fail their")
    assert right == f"good: {shelf / 'deep' / 'good.cmb'}: 90x70, colour, model 'small-random'"
    assert other == (
        f"not checked: {shelf / 'foreign.cmb'}: the file needs model {needed}, "
        "which is not available; docs/models.md lists the bundled models; name it with --model"
    )
    assert summary == "good 1, bad 2, not checked 1"
    assert err == ""
    assert names(shelf) == before


def test_only_good_files_give_0(
    shelf: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is named twice counts once; one that could not be checked is no success."""
    right = str(shelf / "deep" / "good.cmb")
    options = ["--model", model_dir, "--jobs", "1"]
    assert main(["verify", right, right, *options]) == 0
    out = capsys.readouterr().out
    assert out.endswith("good 1, bad 0, not checked 0\n")
    for other in ("foreign.cmb", "missing.cmb"):
        assert main(["verify", right, str(shelf / other), *options]) == 1
    capsys.readouterr()
    assert main(["verify", right, *options, "--max-memory", "0.0001"]) == 1
    assert capsys.readouterr().out.startswith(f"not checked: {right}: 90x70 pixels take about")


def test_bundled_model_needs_no_option(good: bytes, model: CMamba) -> None:
    data = cmamba_ref.encode(make_image(64, 64)[..., 0])
    assert verify_file(data, model, **LIMITS) == "64x64, grey, model 'tiny'"
    with pytest.raises(ModelMismatchError, match=model.model_id.hex()):
        verify_file(good, codec.default_model(), **LIMITS)


def test_verify_reconstructs_nothing(
    good: bytes, model: CMamba, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("this must not be reached")

    monkeypatch.setattr(CMamba, "reconstruct", fail)
    verify_file(good, model, **LIMITS)


def test_limits_hold(good: bytes, model: CMamba) -> None:
    with pytest.raises(BitstreamError, match="more than the limit of 9000"):
        verify_file(good, model, max_pixels=9000, max_memory=None)
    with pytest.raises(cmamba_ref.MemoryLimitError):
        verify_file(good, model, max_pixels=10**6, max_memory=1000)


# ---------------------------------------------------------------- encode --verify


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for name, seed in (("a.png", 0), ("b.png", 1)):
        Image.fromarray(make_image(33, 64, seed)).save(folder / name)
    return folder


def test_encode_verify_writes_the_same_file(
    album: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", model_dir, "--jobs", "1", "--verify"]
    assert main(["encode", str(album / "a.png"), *options]) == 0
    assert capsys.readouterr().out.endswith(" s, verified\n")
    plain = album / "plain.cmb"
    assert main(["encode", str(album / "a.png"), "-o", str(plain), "--model", model_dir]) == 0
    assert "verified" not in capsys.readouterr().out
    assert (album / "a.cmb").read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("many", [False, True])
def test_undecodable_file_is_never_written(
    album: Path,
    model_dir: str,
    wrong_symbols: bytes,
    many: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even under another name, and what was there before stays."""
    monkeypatch.setattr(codec, "encode", lambda *_, **__: wrong_symbols)
    (album / "a.cmb").write_bytes(b"old")
    before = names(album)
    source = album if many else album / "a.png"
    args = ["encode", str(source), "--model", model_dir, "--jobs", "1", "--force"]
    assert main([*args, "--verify"]) == 1
    assert "the decoded symbols fail their check" in capsys.readouterr().err
    assert names(album) == before
    assert (album / "a.cmb").read_bytes() == b"old"
    assert main(args) == 0  # which is why one may want to verify
    assert (album / "a.cmb").read_bytes() == wrong_symbols


def test_disk_corruption_is_detected(
    album: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_bytes

    def flip(path: Path, data: bytes) -> int:
        # With right checksums, it is a valid file of a grey image.
        return write(path, with_field(data, "flags", 1))

    monkeypatch.setattr(Path, "write_bytes", flip)
    before = names(album)
    args = ["encode", str(album / "a.png"), "--model", model_dir, "--verify"]
    assert main(args) == 1
    assert "a.cmb: the bytes read back are not those written" in capsys.readouterr().err
    assert names(album) == before


def test_wrong_decoded_shape_is_detected(good: bytes, model: CMamba) -> None:
    verify_encoded(good, good, make_image(70, 90), model, **LIMITS)
    with pytest.raises(BitstreamError, match=r"shape \[90, 70, 3\] came back as \[70, 90, 3\]"):
        verify_encoded(good, good, make_image(90, 70), model, **LIMITS)
