"""README and docs: their length, their links, and their snippets, which are run."""

import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from cmamba_ref import cli
from cmamba_ref.codec import refinement
from cmamba_ref.nn.blocks import BLOCKS
from cmamba_ref.ops.dispatch import BACKENDS
from tests.codec_helpers import ENVIRONMENT, TESTS
from tests.rd_helpers import write_results
from tests.training_helpers import make_images, write_config

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_README_WORDS = 1000
SNIPPET = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)

TRAIN = (
    "--minutes 0.001 --crop 64 --batch 2 --until --warmup 0 --validation 1 --validation-crop 64 "
    "--samples 0 --coded never --processes 1 --device cpu --precision fp32 "
)
EVAL_RD = "--limit 1 --codecs --brief --qualities 2 --jobs 1"
# Options that make a command short, by how it begins; the last of an option counts.
SHORTER = {
    "cmamba encode photos": "--jobs 1",
    "cmamba decode small": "--jobs 1",
    "cmamba verify small": "--jobs 1",
    "cmamba encode photo.jpg -o 20kb.cmb": "--nearest",  # the image is too small for 20 kB
    "python tools/train.py": TRAIN + "--config small.json",
    "python mine.py train": TRAIN,
    "python tools/eval_rd.py": EVAL_RD + " -o eval.json",  # rd.json has curves that overlap
    "python mine.py eval_rd": EVAL_RD,
    "python tools/analyze.py": "--limit 1",
    "python tools/complexity.py": "--size 64x64 tiny",
}
# Commands that are not run, by how they begin, and why.
NOT_RUN = {
    "python -m pip install": "it changes the environment; the gate runs those of the README",
    "python3 -m venv": "it makes an environment; the gate makes its own",
    "git restore": "it changes the checkout",
    "python -m pytest": "the tests themselves",
    "HYPOTHESIS_PROFILE=long python -m pytest": "the tests themselves",
    "python tests/golden/make.py": "it replaces the golden files",
    "python tools/fuzz.py": "it needs the extra fuzz; tests/test_fuzz.py tries the targets",
    "python tools/determinism.py": "a process per combination; see tests/test_determinism.py",
}
# Engines whose examples are run where they are installed; the page says with which versions.
RUN_BY_HAND = {"ray", "pyspark"}
# It needs images of equal sizes: tests/test_integrations.py.
TESTED_ELSEWHERE = "DataLoader"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    words = [word for word in PAGES[0].read_text().split() if any(map(str.isalnum, word))]
    assert len(words) <= MAX_README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# ---------------------------------------------------------------- snippets


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page, with all that its snippets read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    make_images(tmp_path / "photos")
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8)
    for path in ("photo.jpg", "photos/a.jpg"):
        Image.fromarray(noise[:64, :96]).save(path)
    Path("images").mkdir()
    Image.fromarray(noise).save("images/a.png")
    write_results(tmp_path)
    write_config(tmp_path / "small.json")
    shutil.copytree(TESTS / "golden" / "model", "tiny-0b660bd2")
    shutil.copytree(TESTS / "golden" / "model", "runs/mine/model")
    shutil.copy(TESTS / "golden" / "colour.cmb", "old.cmb")
    Path("tools").symlink_to(ROOT / "tools")
    hub = SimpleNamespace(snapshot_download=lambda *_, **__: "runs/mine/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(refinement, "STEPS", range(10))
    return tmp_path


def option(command: str, table: dict[str, str]) -> str | None:
    """What a table says of a command."""
    return next((text for start, text in table.items() if command.startswith(start)), None)


def run_command(command: str) -> None:
    """Run a line of a shell, in this process where it needs no shell."""
    if option(command, NOT_RUN):
        paths = re.findall(r"tests/[\w/.]+", command)
        assert all((ROOT / path).exists() for path in paths), command
        return
    # One of several processes does the same.
    command = re.sub(r"^torchrun --nproc-per-node \d+ ", "python ", command)
    words = shlex.split(f"{command.partition(' #')[0]} {option(command, SHORTER) or ''}")
    if {"<", ">", "|"} & set(words):
        cmamba = f'cmamba() {{ {shlex.quote(sys.executable)} -m cmamba_ref "$@"; }}\n'
        subprocess.run(cmamba + command, shell=True, check=True, env=ENVIRONMENT)
    elif words[0] == "cmamba":
        assert cli.main(words[1:]) == 0, command
    elif words[0] == "python":
        with mock.patch.object(sys, "argv", words[1:]):
            try:
                runpy.run_path(words[1], run_name="__main__")
            except SystemExit as end:
                assert not end.code, f"{command}: {end}"
    else:
        pytest.fail(f"an unknown command: {command}; add it to NOT_RUN, with a reason")


def run_python(code: str, earlier: str, names: dict[str, object]) -> None:
    """Run an example; one that begins with the name of a file becomes that file.

    Args:
        earlier: the examples before it on the page, for one that must be a program of its own.
        names: what they have defined.
    """
    if name := re.match(r"# (\w+\.py)\n", code):
        Path(name[1]).write_text(code)
    elif '__name__ == "__main__"' in code:
        Path("program.py").write_text(earlier + code)
        subprocess.run([sys.executable, "program.py"], check=True, env=ENVIRONMENT, timeout=600)
    else:
        exec(compile(code, "example", "exec"), names)


def is_run_here(code: str) -> bool:
    """Whether this is no example for an engine that is not installed, nor one with its own test."""
    modules = set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) & RUN_BY_HAND
    return all(map(importlib.util.find_spec, modules)) and TESTED_ELSEWHERE not in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, folder: Path):
    with mock.patch.dict(BACKENDS), mock.patch.dict(BLOCKS):  # examples may register theirs
        earlier, names = "", {"__name__": "example"}
        for mark, text in SNIPPET.findall(page.read_text()):
            if mark == "python" and is_run_here(text):
                run_python(text, earlier, names)
                earlier += text
            elif not mark:
                for line in filter(None, text.splitlines()):
                    run_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_examples_are_in_fences(page: Path):
    outside = SNIPPET.sub("", page.read_text())
    assert not re.findall(r"^ +(?:cmamba|python|torchrun|import|from) .*", outside, re.M)


def test_there_are_snippets():
    marks = [mark for page in PAGES for mark, _ in SNIPPET.findall(page.read_text())]
    assert marks.count("python") >= 5 and marks.count("") >= 5
