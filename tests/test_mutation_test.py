"""The tool that makes mutants: which it makes, that tests meet them, and what it says of them."""

import ast
import json
import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the tool's limits are Linux's", allow_module_level=True)

import mutation_test
from mutation_test import MODULES, UnsoundError, changes, mutants_of

SOURCE = '''
"""Docstring."""
import math
LIMIT = 3
def f(x: int = 1) -> int:
    """Docstring."""
    if x < LIMIT and not x == 0:
        raise ValueError(f"{x + 1} is small")
    x += 2
    print(x[1:x], True)
    return -x if x else x // 2
'''
DEFECTS = [
    "LIMIT = 4", "LIMIT = 2", "def f(x: int=2)", "def f(x: int=0)", "if x < LIMIT or not x == 0:",
    "if x <= LIMIT and", "not x != 0", "x == 1):", "x == -1):", "and x == 0:", "x -= 2", "x += 3",
    "x += 1", "x[1:x + 1]", "x[2:x]", "x[0:x]", "False)", "if not x else", "return x if x",
    "x * 2", "x // 3", "x // 1",
]  # fmt: skip


def test_the_defects_are_these():
    tree = ast.parse(SOURCE)
    sound = ast.unparse(tree)
    texts = []
    for _, _, change in changes(tree):
        undo = change()
        texts.append(ast.unparse(ast.fix_missing_locations(tree)))
        undo()
        assert ast.unparse(tree) == sound
    assert sound not in texts and len(set(texts)) == len(texts)
    for defect in DEFECTS:
        assert sum(defect in text and defect not in sound for text in texts) >= 1, defect
    # And three statements left out: the raise, the addition, the call.
    assert len(texts) == len(DEFECTS) + 3


def test_a_mutant_is_what_it_says():
    for module in MODULES:
        mutants = mutants_of(module)
        assert len({m.key for m in mutants}) == len(mutants) > 5
        assert all(m.before != m.after for m in mutants)
        lines = mutation_test.source_of(module).read_text().splitlines()
        assert all(m.line <= len(lines) for m in mutants)


@pytest.mark.slow
def test_tests_meet_the_mutant_and_the_sound_module_passes(root):
    """In a process that has not imported the module, as the tool's own."""
    code = """
import sys
sys.path.append("tools")
import mutation_test
for mutant in (mutation_test.Mutant("bitstream", 0, 0, "", "", ""), None):
    print(mutation_test.run_tests("bitstream", mutant, 300)["outcome"])
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.stdout.split() == ["killed", "survived"], run.stderr


def test_mutants_whose_test_has_gone_are_tried_again():
    here = "test_mutation_test.py::test_the_defects_are_these"
    assert mutation_test.still_there(here) and mutation_test.still_there(f"{here}[1-b]")
    assert mutation_test.still_there("end of the process, status 24")
    assert not mutation_test.still_there("test_mutation_test.py::test_the_defects")
    assert not mutation_test.still_there("test_gone.py::test_the_defects_are_these")


def test_a_module_that_is_imported_already_is_refused():
    import cmamba_ref.codec.container  # noqa: F401

    with pytest.raises(UnsoundError, match="imported before its mutants"):
        mutation_test.run_tests("bitstream", None, 1)


def test_the_summary_counts_and_explains(tmp_path, monkeypatch):
    explained, not_explained = (["bitstream", "f", "a", b] for b in "bc")
    path = tmp_path / "why.json"
    path.write_text(json.dumps([{"what": explained, "why": "only speed"}]))
    monkeypatch.setattr(mutation_test, "EXPLANATIONS", path)
    rows = [
        {"what": what, "line": 1, "outcome": outcome}
        for what, outcome in (
            (explained, "survived"),
            (not_explained, "survived"),
            (["codec", "g", "d", "e"], "killed"),
        )
    ]
    found = mutation_test.summary(rows, mutation_test.Counter(bitstream=5, codec=2))
    assert (found["mutants"], found["run"], found["killed"]) == (7, 3, 1)
    assert found["by_module"]["bitstream"] == {"all": 5, "run": 2, "killed": 0}
    assert [s["why"] for s in found["survivors"]] == ["only speed", ""]
    assert found["unexplained"] == 1
