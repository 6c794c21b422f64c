"""Weights on disk: their hash, and where a model is looked for, the Hugging Face Hub included."""

import hashlib
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cmamba_ref import CMamba, WeightsError
from tests.codec_helpers import random_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a small model."""
    random_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hub(monkeypatch) -> types.ModuleType:
    """A module in place of huggingface_hub, without `snapshot_download` yet."""
    module = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_hash_is_the_one_of_sha256sum(saved):
    line = (saved / "model.safetensors.sha256").read_text()
    digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert line == f"{digest}  model.safetensors\n"
    if shutil.which("sha256sum"):
        check = ["sha256sum", "--check", "--status", "model.safetensors.sha256"]
        assert subprocess.run(check, cwd=saved).returncode == 0


@pytest.mark.parametrize("kind", [str, Path])
def test_a_name_that_no_file_can_have_is_refused(kind):
    with pytest.raises(WeightsError, match="cannot read the weights in 'xxx"):
        CMamba.from_pretrained(kind("x" * 300))


def test_hash_mismatch_is_refused(saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # a bit of a weight: nothing else would notice
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        CMamba.from_pretrained(saved)
    (saved / "model.safetensors.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match="cannot read the weights"):
        CMamba.from_pretrained(saved)
    # A directory without a hash is as good as before.
    (saved / "model.safetensors.sha256").unlink()
    CMamba.from_pretrained(saved)


def test_saving_over_another_model_renews_the_hash(saved, monkeypatch):
    other = random_model(seed=1)
    other.save_pretrained(saved)
    assert CMamba.from_pretrained(saved).model_id == other.model_id
    # A save that fails half-way leaves no hash of other weights behind.
    from cmamba_ref import weights

    write = weights.write_atomically

    def full_disk(path, data):
        if path.name == "config.json":
            raise OSError("no space left")
        write(path, data)

    monkeypatch.setattr(weights, "write_atomically", full_disk)
    with pytest.raises(OSError, match="no space"):
        random_model(seed=2).save_pretrained(saved)
    assert CMamba.from_pretrained(saved).model_id == random_model(seed=2).model_id


def test_models_come_from_the_hub(saved, hub):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append(repo_id)
        assert set(allow_patterns) >= {"config.json", "model.safetensors"}
        assert "model.safetensors.sha256" in allow_patterns
        return str(saved)

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    model = CMamba.from_pretrained("someone/cmamba-small")
    assert asked == ["someone/cmamba-small"]
    assert model.model_id == random_model().model_id


def test_a_directory_comes_before_the_hub(saved, hub, monkeypatch):
    """And nothing is asked of the hub that cannot be a repository there."""
    monkeypatch.chdir(saved.parent.parent)
    CMamba.from_pretrained(f"{saved.parent.name}/saved".replace("//", "/"))
    for source in ("no-such-model", "./a/b", "a/b/c", "/a/b", "a/", Path("a b/c")):
        with pytest.raises(WeightsError, match="no config.json"):
            CMamba.from_pretrained(source)


def test_damaged_download_is_detected(saved, hub):
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-4])
    hub.snapshot_download = lambda *_, **__: str(saved)  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match="SHA-256"):
        CMamba.from_pretrained("someone/cmamba-small")


def test_missing_hub_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"no directory .*\.\[hub\]"):
        CMamba.from_pretrained("someone/cmamba-small")


def test_failed_download_is_reported(hub):
    def snapshot_download(*_, **__):
        raise ConnectionError("no route to host")

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match="cannot be downloaded .* no route to host"):
        CMamba.from_pretrained("someone/cmamba-small")


# ---------------------------------------------------------------- wrapped models


def test_weights_of_a_wrapped_model_load(saved):
    """By `load_state_dict`, and from a directory that another program has written."""
    model = random_model()
    wrapped = torch.nn.DataParallel(model).state_dict()
    assert all(name.startswith("module.") for name in wrapped)
    other = random_model(seed=1)
    assert not any(other.load_state_dict(wrapped))
    assert other.model_id == model.model_id
    (saved / "model.safetensors.sha256").unlink()
    save_file(wrapped, saved / "model.safetensors")
    assert CMamba.from_pretrained(saved).model_id == model.model_id


def test_weights_wrapped_in_part_are_refused(saved):
    state = random_model().state_dict()
    name = next(iter(state))
    state[f"module.{name}"] = state.pop(name)
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"module.{name}"'):
        random_model().load_state_dict(state)
    (saved / "model.safetensors.sha256").unlink()
    save_file(state, saved / "model.safetensors")
    with pytest.raises(WeightsError, match=f"module.{name} is .* no such tensor"):
        CMamba.from_pretrained(saved)
