"""What results say of how they were made: a commit that holds, and nothing of the machine."""

import shutil
import subprocess
from pathlib import Path

import provenance
import pytest
from provenance import ROOT, portable


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("images", "images"),
        ("--jobs", "--jobs"),
        ("/home/me/images/kodak", "kodak"),
        ("../shared/kodak", "kodak"),
        ("mine=/home/me/runs/a/model", "mine=model"),
        ("--data=/home/me/photos", "--data=photos"),
        ("/home/me/anchors.json:kodak/VTM-9.1", "anchors.json:kodak/VTM-9.1"),
        (str(ROOT / "benchmarks" / "rd.json"), "benchmarks/rd.json"),
        (f"{ROOT / 'benchmarks' / 'rd.json'}:cmamba", "benchmarks/rd.json:cmamba"),
    ],
)
def test_the_command_has_no_folder_of_this_machine(given, said):
    assert portable(given) == said
    assert provenance.of_run("some.py", [given])["command"] == f"python tools/some.py {said}"


def test_only_what_is_measured_with_makes_a_commit_dirty(tmp_path, monkeypatch):
    """The results that one measurement writes do not make the next one's commit another."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    files = [tmp_path / name for name in ("benchmarks/rd.json", "README.md", "tool.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("before")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    clean = provenance.commit()
    assert "dirty" not in clean and clean != "unknown"
    result, page, tool = files
    for file in (result, page):
        file.write_text("after")
        assert provenance.commit() == clean
    tool.write_text("after")
    assert provenance.commit() == f"{clean}-dirty"


def test_without_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"
