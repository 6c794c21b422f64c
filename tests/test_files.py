"""`encode_file` and `decode_file`: alone, and spread over processes by engines that people use."""

import logging
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec_helpers import ENVIRONMENT, load_image, make_image, random_model
from PIL import Image

import cmamba_ref
from cmamba_ref import CMambaError, decode_file, encode_file, errors
from cmamba_ref.codec import files, images
from cmamba_ref.codec.files import FileResult

PIXELS = make_image(40, 56)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_a_file_and_back(photo: Path, tmp_path: Path):
    encoded, decoded = tmp_path / "new" / "a.cmb", tmp_path / "newer" / "a.png"
    result = encode_file(photo, encoded, random_model(), quality=2.5)
    assert encoded.read_bytes() == cmamba_ref.encode(PIXELS, random_model(), 2.5)
    sizes = photo.stat().st_size, encoded.stat().st_size
    assert result == FileResult(str(photo), str(encoded), *sizes, 56, 40)

    result = decode_file(str(encoded), str(decoded), random_model())
    expected = cmamba_ref.decode(encoded.read_bytes(), random_model())
    np.testing.assert_array_equal(load_image(decoded), expected)
    sizes = encoded.stat().st_size, decoded.stat().st_size
    assert result == FileResult(str(encoded), str(decoded), *sizes, 56, 40)


def test_the_input_may_be_removed_while_it_is_encoded(photo: Path):
    data = photo.read_bytes()
    read = files.read_source(data, str(photo), files.EncodeOptions())
    photo.unlink()
    output = photo.with_suffix(".cmb")
    result = files.write_encoded(photo, output, read, random_model(), files.EncodeOptions())
    assert (result.bytes_in, result.bytes_out) == (len(data), output.stat().st_size)


def test_the_output_is_beside_the_input_and_the_model_bundled(photo: Path):
    assert encode_file(photo).output == str(photo.with_suffix(".cmb"))
    photo.unlink()
    assert decode_file(photo.with_suffix(".cmb")).output == str(photo)
    expected = cmamba_ref.decode(cmamba_ref.encode(PIXELS))
    np.testing.assert_array_equal(load_image(photo), expected)


@pytest.mark.filterwarnings("ignore:quality .* gains nothing")  # the weights are random
def test_options_reach_the_codec(photo: Path, tmp_path: Path, model_dir: str):
    photo.touch()
    os.utime(photo, (1, 1))
    Image.fromarray(PIXELS).save(photo.with_suffix(".jpg"), exif=b"Exif\0\0II*\0\b" + bytes(9))
    target = tmp_path / "a.cmb"
    sized = encode_file(photo, target, model_dir, target=("size", 10**6), nearest=True)
    assert sized.quality == 8
    assert target.read_bytes() == cmamba_ref.encode(PIXELS, random_model(), 8)
    kept = encode_file(photo, target, model_dir, overwrite=True, keep_time=True, verify=True)
    assert kept.quality is None and target.stat().st_mtime == 1
    jpeg = photo.with_suffix(".jpg")
    assert encode_file(jpeg, target, model_dir, overwrite=True).dropped == ("EXIF",)
    assert not encode_file(jpeg, target, model_dir, overwrite=True, keep_metadata=True).dropped
    with pytest.raises(errors.MemoryLimitError):
        encode_file(photo, tmp_path / "b.cmb", model_dir, max_memory=1000)
    with pytest.raises(errors.MemoryLimitError):
        decode_file(target, tmp_path / "b.png", model_dir, max_memory=1000)
    for max_pixels in (100, 0):
        with pytest.raises(errors.ImageError, match="max_pixels"):
            encode_file(photo, tmp_path / "b.cmb", model_dir, max_pixels=max_pixels)
    with pytest.raises(errors.InvalidArgumentError, match="`model` must be a CMamba"):
        decode_file(target, tmp_path / "b.png", 5)
    for wrong in (1000, "size"):
        with pytest.raises(errors.InvalidArgumentError, match="a kind and a number"):
            encode_file(photo, tmp_path / "b.cmb", model_dir, target=wrong)
    with pytest.raises(TypeError, match="qualty"):
        encode_file(photo, tmp_path / "b.cmb", model_dir, qualty=3)


@pytest.mark.parametrize("options", [{"quality": 5, "target": ("size", 500)}, {"nearest": True}])
def test_options_that_contradict_are_refused(photo: Path, options: dict[str, Any]):
    with pytest.raises(cmamba_ref.InvalidArgumentError, match="target"):
        encode_file(photo, on_error="return", **options)
    assert not photo.with_suffix(".cmb").exists()


def test_what_exists_is_skipped(photo: Path, tmp_path: Path):
    target = tmp_path / "a.cmb"
    target.write_bytes(b"before")
    assert encode_file(photo, target).skipped
    assert decode_file(target, photo).skipped
    assert target.read_bytes() == b"before"
    assert not encode_file(photo, target, overwrite=True).skipped
    assert target.read_bytes() != b"before"


@pytest.mark.parametrize("name", ["photo.png", "link", "folder", "pipe"])
def test_the_output_must_be_another_file(photo: Path, name: str):
    target = photo.with_name(name)
    photo.with_name("link").symlink_to(photo)
    photo.with_name("folder").mkdir()
    os.mkfifo(photo.with_name("pipe"))
    kind = stat.S_IFMT(target.stat().st_mode)
    message = "the output must be a file, and another one than the input"
    for overwrite in (False, True):
        with pytest.raises(cmamba_ref.InvalidArgumentError, match=message):
            encode_file(photo, target, overwrite=overwrite)
        assert message in str(encode_file(photo, target, on_error="return").error)
    assert stat.S_IFMT(target.stat().st_mode) == kind
    np.testing.assert_array_equal(load_image(photo), PIXELS)


def test_a_name_that_no_file_can_have_is_returned(photo: Path):
    """It must not stop an engine."""
    result = encode_file(photo, photo.with_name(300 * "z"), on_error="return")
    assert "File name too long" in str(result.error)
    photo.with_name("loop").symlink_to("loop")
    result = encode_file(photo.with_name("loop"), photo.with_name("a.cmb"), on_error="return")
    assert "symbolic links" in str(result.error)


def test_a_device_that_is_missing_is_named(photo: Path, model_dir: str):
    with pytest.raises(cmamba_ref.InvalidArgumentError, match="`device` must be .*'cuda:99'"):
        encode_file(photo, model=model_dir, device="cuda:99")
    assert not photo.with_suffix(".cmb").exists()


def test_a_relative_model_is_that_of_the_current_folder(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(tmp_path / str(seed))
        random_model(seed=seed).save_pretrained("model")
        encode_file(photo, tmp_path / f"{seed}.cmb", "model")
    first, second = ((tmp_path / f"{seed}.cmb").read_bytes() for seed in (1, 2))
    assert first != second


def test_a_folder_does_not_hide_a_bundled_model(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("tiny")
    encode_file(photo, "a.cmb", "tiny")
    bundled = cmamba_ref.CMamba.from_pretrained("tiny")
    assert Path("a.cmb").read_bytes() == cmamba_ref.encode(PIXELS, bundled)
    encode_file(photo, "b.cmb", "./tiny")
    assert Path("b.cmb").read_bytes() == cmamba_ref.encode(PIXELS, random_model())


def test_errors_are_raised_or_returned(photo: Path, tmp_path: Path):
    target = tmp_path / "a.cmb"
    with pytest.raises(OSError, match="missing"):
        encode_file(tmp_path / "missing", target)
    photo.write_bytes(b"no image")
    with pytest.raises(cmamba_ref.ImageError, match="no image in a format"):
        encode_file(photo, target)
    result = encode_file(photo, target, on_error="return")
    assert result.error is not None and result.error.startswith(f"{photo} is no image")
    result = decode_file(photo, tmp_path / "b.png", on_error="return")
    assert result.error is not None and result.error.startswith(f"{photo}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(cmamba_ref.InvalidArgumentError, match="on_error"):
        encode_file(photo, target, on_error="ignore")


@pytest.mark.parametrize("name", ["i", "file"])
def test_errors_name_files_whose_name_is_in_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"no .cmb file")
    result = decode_file(name, "a.png", on_error="return")
    assert str(result.error).startswith(f"{name}: this is not a .cmb file")


def test_a_mistake_is_never_returned(photo: Path, tmp_path: Path, monkeypatch):
    def broken(*_: object, **__: object):
        raise KeyError("a mistake")

    monkeypatch.setattr(images, "parse_image", broken)
    with pytest.raises(KeyError):
        encode_file(photo, tmp_path / "a.cmb", on_error="return")


def subclasses(kind: type) -> list[type]:
    return [kind, *(k for child in kind.__subclasses__() for k in subclasses(child))]


@pytest.mark.parametrize("kind", subclasses(CMambaError))
def test_errors_can_be_pickled(kind: type):
    error = kind("text")
    if kind is errors.ImageError:
        error = errors.ImageError("text", "why")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == "text" and vars(again) == vars(error)


def test_who_hands_out_work_loads_no_torch():
    script = """
import pickle, sys
from functools import partial
import cmamba_ref
pickle.dumps(partial(cmamba_ref.encode_file, quality=5, on_error="return"))
assert not {"torch", "PIL", "numpy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True)


# ---------------------------------------------------------------- engines


@pytest.fixture
def album(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """200 small images, and where they go."""
    sources = [tmp_path / "photos" / f"{i:03}.png" for i in range(200)]
    sources[0].parent.mkdir()
    for i, path in enumerate(sources):
        Image.fromarray(make_image(24, 32, seed=i)).save(path)
    return sources, [tmp_path / "small" / f"{path.stem}.cmb" for path in sources]


def check_album(sources: list[Path], outputs: list[Path], results: list[FileResult]) -> None:
    """Every image has its file, and there are no others."""
    assert [result.output for result in results] == list(map(str, outputs))
    assert not any(result.error for result in results)
    model = random_model()
    for source, output in zip(sources, outputs, strict=True):
        assert output.read_bytes() == cmamba_ref.encode(load_image(source), model, 3)
    assert sorted(outputs[0].parent.iterdir()) == sorted(outputs)


def inodes(paths: list[Path]) -> dict[str, int]:
    """What a file that is written again gets anew."""
    return {path.name: path.stat().st_ino for path in paths if path.exists()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_dask_loses_nothing_with_a_worker(album, model_dir: str, monkeypatch):
    """One of two workers is killed midway; a second run finds everything done."""
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    sources, outputs = album
    options = {"model": model_dir, "quality": 3, "on_error": "return", "pure": False}
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**local, silence_logs=logging.CRITICAL) as cluster,
        distributed.Client(cluster) as client,
    ):
        tasks = client.map(encode_file, sources, outputs, **options)
        finished = distributed.as_completed(tasks)
        for _ in range(40):
            next(finished)
        before = inodes(outputs)
        os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
        results = client.gather(tasks)
        check_album(sources, outputs, results)
        assert 40 <= len(before) < 200  # it was midway
        after = inodes(outputs)
        assert before.items() <= after.items()  # none was written twice

        again = client.gather(client.map(encode_file, sources, outputs, **options))
        assert all(result.skipped for result in again) and inodes(outputs) == after


def test_the_executor_of_the_standard_library(album, model_dir: str):
    """A damaged file among others is a result like theirs."""
    sources, outputs = (paths[:16] for paths in album)
    encode = partial(encode_file, model=model_dir, quality=3, on_error="return")
    sources[5].write_bytes(b"damaged")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(encode, sources, outputs))
    assert (results[5].output, results[5].skipped) == (str(outputs[5]), False)
    assert str(results[5].error).startswith(f"{sources[5]} is no image")
    for paths in (sources, outputs, results):
        del paths[5]
    check_album(sources, outputs, results)


def test_the_documented_arguments_are_those_of_the_command():
    """docs/scale.md says that the options are those of the command line."""
    from cmamba_ref.cli.commands import _parser
    from cmamba_ref.codec.files import EncodeOptions

    help_text = next(
        action.choices["encode"].format_help()
        for action in _parser()._actions
        if action.choices and "encode" in action.choices
    )
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", help_text)}
    for name in EncodeOptions.__dataclass_fields__:
        assert name in flags or f"{name}_size" in flags, name
