"""Weights on disk: `config.json` and `model.safetensors` in a directory.  Pickle is never read.

Beside them may lie the SHA-256 of `model.safetensors`, in a form that `sha256sum --check` reads.
A directory without `model.safetensors` may hold the difference from a bundled model instead.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from cmamba_ref import bundled, model_id
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.bundled import pretrained_names
from cmamba_ref.config import CMambaConfig
from cmamba_ref.errors import WeightsError
from cmamba_ref.model_id import HASH_FILE, WEIGHTS_FILE
from cmamba_ref.weight_difference import DIFFERENCE_FILE, stored_file, unpack

if TYPE_CHECKING:
    from cmamba_ref.model import CMamba

T = TypeVar("T")

CONFIG_FILE = "config.json"
WRAPPER = "module."
# A repository of the Hugging Face Hub: user/repository.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def content_id(state: Mapping[str, Tensor]) -> bytes:
    """The id of a model with these tensors."""

    def describe(name: str) -> tuple[str, str, list[int], bytes]:
        tensor = state[name].detach().cpu().contiguous()
        values = tensor.flatten().view(torch.uint8).numpy().tobytes()
        return name, str(tensor.dtype), list(tensor.shape), values

    return model_id.id_of(map(describe, sorted(state)))


def to_bytes(model: CMamba) -> bytes:
    """Serialise the weights as `model.safetensors` holds them.

    A float32 tensor whose values all fit float16 exactly is written as such: nothing is lost, and
    weights that were rounded on purpose take half the room.

    Raises:
        WeightsError: the model is, or was, cast to another precision than float32.
    """
    cast = {str(p.dtype) for p in model.parameters()} - {"torch.float32"}
    if cast:
        raise WeightsError(
            f"a model is saved in float32, this one holds {', '.join(sorted(cast))}; "
            "save it before casting"
        )
    tensors = model.state_dict()
    if content_id(tensors) != model.model_id:
        raise WeightsError(
            "a model is saved as it was made, this one was cast and cast back; save it before, or "
            "load its state_dict into a new CMamba"
        )
    state = {name: _compact(tensor.cpu()) for name, tensor in tensors.items()}
    return serialize(state, metadata={"format": "pt"})


def save(model: CMamba, directory: str | os.PathLike) -> None:
    """Write a model; each file replaces the old one only when it is complete.

    Raises:
        WeightsError: the model is, or was, cast to another precision than float32.
    """
    data = to_bytes(model)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    # The hash goes first and comes last: it never stands beside weights that it is not of.
    (target / HASH_FILE).unlink(missing_ok=True)
    write_atomically(target / WEIGHTS_FILE, data)
    write_atomically(target / CONFIG_FILE, model.config.to_json().encode())
    line = f"{hashlib.sha256(data).hexdigest()}  {WEIGHTS_FILE}\n"
    write_atomically(target / HASH_FILE, line.encode())


def _compact(tensor: Tensor) -> Tensor:
    half = tensor.half()
    exact = tensor.dtype == torch.float32 and torch.equal(half.float(), tensor)
    return (half if exact else tensor).contiguous()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def without_wrapper(state: Mapping[str, T]) -> Mapping[str, T]:
    """Return a state dict as of the model itself, where it is of the model in a `DataParallel`.

    That and DistributedDataParallel put "module." before every name. Where only some have it, they
    stay, and loading refuses them.
    """
    if state and all(name.startswith(WRAPPER) for name in state):
        return {name.removeprefix(WRAPPER): value for name, value in state.items()}
    return state


def _find(source: str) -> Path:
    """The directory that holds a model, downloaded if need be."""
    if source in pretrained_names():
        return bundled.PRETRAINED / source
    if Path(source).exists() or not HUB_ID.fullmatch(source):
        return Path(source)
    try:
        from huggingface_hub import (  # pyright: ignore[reportMissingImports]
            snapshot_download,
        )
    except ImportError as error:
        raise WeightsError(
            f"there is no directory {source!r}; to take it for a repository of the Hugging Face "
            'Hub, in a clone: python -m pip install ".[hub]"'
        ) from error
    try:
        wanted = [CONFIG_FILE, WEIGHTS_FILE, HASH_FILE, DIFFERENCE_FILE]
        return Path(snapshot_download(source, allow_patterns=wanted))
    # Of many types: its own, and those of the HTTP library below it.
    except Exception as error:
        raise WeightsError(
            f"there is no directory {source!r}, and it cannot be downloaded from the Hugging Face "
            f"Hub: {error}"
        ) from error


def _check_hash(data: bytes, path: Path) -> None:
    """Compare the bytes of weights with the hash beside them; there need not be one."""
    if not path.exists():
        return
    expected, found = path.read_text().partition(" ")[0].strip(), hashlib.sha256(data).hexdigest()
    if expected != found:
        raise WeightsError(
            f"{str(path.with_name(WEIGHTS_FILE))!r} has the SHA-256 {found[:16]}..., {path.name} "
            f"beside it says {expected[:16]}...: one of them is damaged or of another model"
        )


def _stored_tensors(path: Path) -> Mapping[str, Tensor]:
    if path.name == DIFFERENCE_FILE:
        try:
            arrays = unpack(path.read_bytes(), bundled.arrays_of)
        except WeightsError as error:
            raise WeightsError(f"cannot read the weights in {str(path)!r}: {error}") from error
        return {name: torch.tensor(array) for name, array in arrays.items()}
    data = path.read_bytes()
    _check_hash(data, path.with_name(HASH_FILE))
    return without_wrapper(deserialize(data))


def load(model_class: type[CMamba], source: str | os.PathLike) -> CMamba:
    """Read a model from the package, by name, from a directory, or from the Hugging Face Hub.

    Of a string, the name of a bundled model comes first: write `./tiny` for a directory of that
    name.  Then comes a directory, then, for "user/repository" where there is none, the Hub.  A
    `Path` is a directory.

    Raises:
        WeightsError: nothing there, damaged, weights that do not fit the configuration or the hash
            beside them, or a download that failed.
    """
    try:
        directory = _find(source) if isinstance(source, str) else Path(source)
        path = stored_file(directory)
        absent = [n for n in (CONFIG_FILE, path.name) if not (directory / n).is_file()]
    except OSError as error:  # a name that is too long, a folder that must not be searched
        raise WeightsError(f"cannot read the weights in {str(source)!r}: {error}") from error
    if absent:
        raise WeightsError(
            f"no {absent[0]} in {str(directory)!r}; give a directory written by save_pretrained, "
            f"or a bundled model: {', '.join(pretrained_names()) or 'none'}"
        )
    try:
        config = CMambaConfig.from_json((directory / CONFIG_FILE).read_text())
        state = {name: _widen(tensor) for name, tensor in _stored_tensors(path).items()}
    # ValueError: InvalidArgumentError, and text that is not UTF-8; deep nesting ends in recursion.
    except (ValueError, RecursionError, SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read the weights in {str(directory)!r}: {error}") from error
    # A configuration of absurd size fails before it costs anything: every block and slice has
    # tensors of its own, and modules on `meta` have no memory.
    if len(config.slice_widths) + sum(config.depths) > len(state):
        raise WeightsError(f"{str(directory)!r}: tensors are missing: there are only {len(state)}")
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (ValueError, RuntimeError) as error:
        raise WeightsError(
            f"no model can be built from the configuration in {str(directory)!r}: {error}"
        ) from error
    expected = model.state_dict()
    for name, tensor in state.items():
        found, need = f"{tensor.dtype}{list(tensor.shape)}", "no such tensor"
        if (wanted := expected.get(name)) is not None:
            # Weights are float32, whatever torch's default type is at the moment.
            dtype = torch.float32 if wanted.is_floating_point() else wanted.dtype
            # Tables, empty before they are loaded, are as long as the file says.
            shape = tensor.shape if wanted.numel() == 0 else wanted.shape
            need = f"{dtype}{list(shape)}"
        if found != need:
            raise WeightsError(
                f"{str(directory)!r}: {name} is {found}, the configuration has {need}"
            )
    if missing := sorted(set(expected) - set(state)):
        raise WeightsError(f"{str(directory)!r}: tensors are missing, among them {missing[:3]}")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{str(directory)!r}: {name} holds NaN or infinity")
    model.load_state_dict(state, assign=True)
    model.latent_coder.check_tables()
    return model
