"""Memory: what is predicted, and that too much of it is refused before any work."""

import subprocess
import sys

import numpy as np
import pytest

from cmamba_ref import MemoryLimitError, codec
from cmamba_ref.cli import main
from cmamba_ref.codec import memory
from cmamba_ref.config import BASE, SMALL, TINY
from cmamba_ref.model import CMamba
from tools import resident


def test_estimate_grows_with_padded_size_and_model():
    sizes = [(256, 256), (512, 768), (1344, 2048), (4000, 6000)]
    for config in (TINY, SMALL, BASE):
        needed = [memory.predict(config, *size) for size in sizes]
        assert needed == sorted(needed)
        assert needed[-1] > 4 * needed[-2]
    assert memory.predict(TINY, 4000, 6000) < memory.predict(SMALL, 4000, 6000)
    assert memory.predict(SMALL, 4000, 6000) < memory.predict(BASE, 4000, 6000)
    assert memory.predict(TINY, 1, 1000) == memory.predict(TINY, 64, 1024)


def test_24_megapixels_take_less_than_8_gib_with_small():
    assert memory.predict(SMALL, 4000, 6000) < 7.5 * memory.GIB


MEASURED = """
import sys, numpy as np, torch
from cmamba_ref import CMamba, encode, decode
from cmamba_ref.codec import refinement
from tools import resident
refinement.STEPS = (0, 2)
torch.set_num_threads(1)
model, side = CMamba.from_pretrained("tiny"), int(sys.argv[1])
encode(np.zeros((64, 64, 3), np.uint8), model, effort=1)
image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
refine = lambda: encode(image, model, effort=1)
data = encode(image, model)
for work in (refine, lambda: encode(image, model), lambda: decode(data, model)):
    taken = []
    for _ in range(3):  # how badly the heap is fragmented varies by a third from call to call
        resident.trim_heap()
        before = resident.resident_bytes()
        resident.restart_peak()
        result = work()
        taken.append(resident.peak_bytes() - before)
    print(min(taken))
"""


@pytest.mark.skipif(resident.resident_bytes() is None, reason="needs Linux's count of memory")
def test_prediction_matches_measured_memory(root):
    side = 1024
    command = [sys.executable, "-c", MEASURED, str(side)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for measured, refined in zip(run.stdout.split(), (True, False, False), strict=True):
        predicted = memory.predict(TINY, side, side, refined=refined)
        assert 0.4 * predicted < int(measured) < 1.1 * predicted


@pytest.fixture
def no_work(monkeypatch):
    def work(*_):
        raise AssertionError("this must not be reached")

    monkeypatch.setattr(CMamba, "compress", work)
    monkeypatch.setattr(CMamba, "decode_latent", work)


def test_image_above_the_memory_limit_is_refused_early(monkeypatch, no_work):
    image = np.zeros((64, 64, 3), np.uint8)
    needed = memory.predict(TINY, 64, 64)
    with pytest.raises(MemoryLimitError, match="64x64 pixels take about .* are allowed; raise"):
        codec.encode(image, max_memory=needed - 1)
    monkeypatch.setattr(memory, "available", lambda: needed - 1)
    with pytest.raises(MemoryLimitError, match="are available"):
        codec.encode(image)
    with pytest.raises(AssertionError):
        codec.encode(image, max_memory=needed)
    monkeypatch.setattr(memory, "available", lambda: None)
    with pytest.raises(AssertionError):
        codec.encode(image)


def test_file_above_the_memory_limit_is_refused_early(monkeypatch, tmp_path, capsys):
    data = codec.encode(np.zeros((64, 64, 3), np.uint8))
    needed = memory.predict(TINY, 64, 64)
    with pytest.raises(MemoryLimitError):
        codec.decode(data, max_memory=needed - 1)
    path = tmp_path / "x.cmb"
    path.write_bytes(data)
    assert main(["decode", str(path), "--max-memory", "0.001"]) == 1
    assert "1 MiB are allowed" in capsys.readouterr().err
    assert main(["decode", str(path), "--max-memory", "2"]) == 0


def test_control_group_limits_count(monkeypatch):
    files = {
        "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:  2000 kB"],
        "/sys/fs/cgroup/memory.max": ["1500000"],
        "/sys/fs/cgroup/memory.current": ["500000"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    assert memory.available() == 1_000_000
    files["/sys/fs/cgroup/memory.stat"] = ["anon 7", "inactive_file 3000", "active_file 2000"]
    assert memory.available() == 1_005_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert memory.available() == 2_048_000
    files.clear()
    assert memory.available() is None
