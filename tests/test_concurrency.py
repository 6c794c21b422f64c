"""One model in many threads, and many processes on one folder: as if each were alone."""

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from codec_helpers import ENVIRONMENT, make_image, random_model, start_cmamba
from PIL import Image

import cmamba_ref
from cmamba_ref import CMamba, codec, pillow_plugin, scan_backend, selective_scan_2d
from cmamba_ref.codec import image_codec
from cmamba_ref.codec.output import png_bytes
from cmamba_ref.entropy import latent_coder
from cmamba_ref.ops import dispatch
from cmamba_ref.testing import scan_2d_arguments

THREADS = 8
# Images of several sizes, each at a quality of its own.
WORK = [(make_image(64 + 24 * (i % 3), 80 + 16 * (i % 5), seed=i), 1 + 0.5 * i) for i in range(8)]


@pytest.fixture(autouse=True)
def short_turns() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual, so that they meet anywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable, items: list, threads: int = THREADS) -> list:
    """`work(item)` in so many threads that begin together."""
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=barrier.wait) as executor:
        return list(executor.map(work, items))


# ---------------------------------------------------------------- threads


def coded(shared: CMamba, image: np.ndarray, quality: float) -> tuple[bytes, bytes]:
    data = cmamba_ref.encode(image, shared, quality)
    return data, cmamba_ref.decode(data, shared).tobytes()


def test_one_model_in_many_threads():
    """From the first use on, when its float64 path and lookups are made, bytes and pixels agree."""
    alone = [coded(random_model(), image, quality) for image, quality in WORK]
    shared = random_model()
    assert at_once(lambda item: coded(shared, *item), WORK) == alone


def test_the_coding_path_is_copied_once(monkeypatch):
    copies = []
    original = latent_coder.float64_copy

    def copy_slowly(module, device):
        copies.append(module)
        time.sleep(0.02)
        return original(module, device)

    monkeypatch.setattr(latent_coder, "float64_copy", copy_slowly)
    shared = random_model()
    at_once(lambda _: shared.latent_coder.float64_modules(), [0] * THREADS)
    assert len(copies) == 2  # h_s and the context model


def test_a_bundled_model_is_loaded_once(monkeypatch):
    loaded = []

    def load(name, device):
        loaded.append(name)
        time.sleep(0.05)
        return random_model()

    monkeypatch.setattr(image_codec.CMamba, "from_pretrained", load)
    image_codec._load.cache_clear()
    try:
        models = at_once(lambda _: codec.default_model(), [0] * THREADS)
    finally:
        image_codec._load.cache_clear()
    assert loaded == ["tiny"] and len(set(map(id, models))) == 1


def test_a_block_holds_for_all_threads():
    with scan_backend("reference"), ThreadPoolExecutor(1) as executor:
        assert executor.submit(dispatch.get_default_backend).result() == "reference"
        with scan_backend("chunked"):
            assert executor.submit(dispatch.get_default_backend).result() == "chunked"
        assert executor.submit(dispatch.get_default_backend).result() == "reference"


def test_threads_with_backends_of_their_own_name_them():
    """Scans by several backends at the same time give what each gives alone."""
    arguments = scan_2d_arguments(height=6, width=7, dtype=torch.float32)
    backends = ["reference", "chunked"] * 4
    alone = {name: selective_scan_2d(**arguments, backend=name) for name in backends}
    together = at_once(lambda name: selective_scan_2d(**arguments, backend=name), backends)
    for name, y in zip(backends, together, strict=True):
        assert torch.equal(y, alone[name])


def test_pillow_in_threads(tmp_path):
    """Opening, decoding and saving."""
    shared = random_model()
    expected = [coded(shared, image, quality) for image, quality in WORK]
    pillow_plugin.use_model(shared)

    def through_pillow(i: int) -> tuple[bytes, bytes]:
        image, quality = WORK[i]
        path = tmp_path / f"{i}.cmb"
        Image.fromarray(image).save(path, model=shared, quality=quality)
        with Image.open(io.BytesIO(expected[i][0])) as opened:
            return path.read_bytes(), np.asarray(opened).tobytes()

    assert at_once(through_pillow, list(range(len(WORK)))) == expected


# ---------------------------------------------------------------- processes


REPLACE = """
import sys
from cmamba_ref.atomic_write import write_atomically

for _ in range(100):
    write_atomically(sys.argv[1], sys.argv[2].encode() * 100_000)
"""


def test_writers_of_one_file_leave_one_whole_version(tmp_path):
    """Two processes replace it; whoever reads meanwhile sees the one or the other."""
    target = tmp_path / "a.cmb"
    target.write_bytes(b"z" * 100_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", REPLACE, str(target), letter], env=ENVIRONMENT)
        for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        data = target.read_bytes()
        assert data == data[:1] * 100_000
        seen.add(data[:1])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen >= {b"a", b"b"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.cmb"]


@pytest.mark.slow
def test_several_commands_into_one_folder(tmp_path, model_dir):
    """Three folders of their own and one that all of them encode, for the same outputs."""
    out = tmp_path / "out"
    expected = {}
    for name in ("a", "b", "c", "all"):
        (tmp_path / name).mkdir()
        for i in range(4):
            image = make_image(70, 90, seed=10 * ord(name[0]) + i)
            (tmp_path / name / f"{name}{i}.png").write_bytes(png_bytes(image))
            expected[f"{name}{i}.cmb"] = cmamba_ref.encode(image, random_model())
    commands = [
        start_cmamba(
            *("encode", str(tmp_path / name), str(tmp_path / "all"), "-o", str(out)),
            *("--model", model_dir, "--jobs", "2", "--force"),
        )
        for name in "abc"
    ]
    for command in commands:
        printed, errors = command.communicate(timeout=300)
        assert (command.returncode, errors) == (0, "")
        assert printed.startswith("encoded 8\n")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


@pytest.mark.slow
def test_several_commands_for_one_target(tmp_path, model_dir):
    """At different qualities: the file is one of theirs, whole."""
    source, target = tmp_path / "photo.png", tmp_path / "photo.cmb"
    source.write_bytes(png_bytes(make_image(70, 90)))
    qualities = (1, 4, 8)
    commands = [
        start_cmamba("encode", str(source), "--quality", str(q), "--model", model_dir, "--force")
        for q in qualities
    ]
    for command in commands:
        assert command.wait(timeout=300) == 0
        command.communicate()
    versions = [cmamba_ref.encode(make_image(70, 90), random_model(), q) for q in qualities]
    assert target.read_bytes() in versions
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.cmb", "photo.png"]
