"""Fixtures and switches shared by all tests.

Environment variables:
    CMAMBA_REQUIRE_TRITON=1: the run fails where triton cannot be imported, and so does every test
        that would skip for want of it. The gate sets it, so that it is never green over nothing.
    HYPOTHESIS_PROFILE: `quick` (default: 15 derandomised examples) or `long` (1000 random ones).
"""

import importlib.util
import os
import signal
from collections.abc import Generator
from pathlib import Path
from types import ModuleType

import hypothesis
import interpreter
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("quick", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Kernel tests on a machine without a GPU run in triton's interpreter. It must be switched on before
# a kernel is defined; a test that compiles ahead of time needs a process without this variable.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What was started in the background may ignore Ctrl-C, and then so does all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads gain little on the small tensors of these tests, and on a machine that does anything else
# they wait for each other: measured up to ten times slower than one.
torch.set_num_threads(1)


def triton_is_required() -> bool:
    return os.environ.get("CMAMBA_REQUIRE_TRITON", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    if triton_is_required():
        try:
            importlib.import_module("triton.language")
        except ImportError as error:
            raise pytest.UsageError(
                f"CMAMBA_REQUIRE_TRITON is set, but triton cannot be imported ({error}); "
                'install it with: python -m pip install -c constraints.txt -e ".[dev]"'
            ) from error


def _fail_if_skipped_for_triton(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip whose reason names triton into a failure, where triton is required."""
    if triton_is_required() and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "triton" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"CMAMBA_REQUIRE_TRITON is set, but this skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped_for_triton(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped_for_triton(report)
    return report


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """All kernels that are interpreted run in half of the time."""
    if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.patch_once_per_launch()


@pytest.fixture(scope="session")
def require_triton() -> ModuleType:
    """The triton module; skips without it, fails where CMAMBA_REQUIRE_TRITON is set."""
    return pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The optional directory `shared` beside the repository; skips without it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no directory `shared` beside the repository")
    return path


@pytest.fixture(scope="session")
def kodak_paths(shared_dir: Path) -> list[Path]:
    """The Kodak images in `shared/data/kodak`, sorted; skips without them."""
    paths = sorted((shared_dir / "data" / "kodak").glob("*.png"))
    if not paths:
        pytest.skip("no Kodak images in `shared/data/kodak` beside the repository")
    return paths


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the weights of a small model, for what takes a model by name."""
    from codec_helpers import random_model  # here: kernels must not be defined before the switches

    directory = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(directory)
    return str(directory)
