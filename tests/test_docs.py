"""README and docs: their length, their links, and their Python examples."""

import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import cmamba_ref
from cmamba_ref.nn.blocks import BLOCKS
from cmamba_ref.ops.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_README_WORDS = 1000
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    )
]


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


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    image = np.full((64, 96, 3), 128, np.uint8)
    Path("photo.cmb").write_bytes(cmamba_ref.encode(image))
    with mock.patch.dict(BACKENDS), mock.patch.dict(BLOCKS):  # examples may register theirs
        exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
