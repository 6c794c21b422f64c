"""The table of costs: its parts add up, what is measured is in it, and others stay as stated."""

import json
import re

import bench_cpu
import complexity
import pytest
from published_costs import PUBLISHED_CODECS

SECONDS = {"encode": 1.5, "decode": 2.25}


@pytest.fixture
def measured(monkeypatch) -> list[tuple]:
    """The measurement replaced by known figures; what it was asked for."""
    asked = []

    def measure_codec(pictures, models, settings):
        asked.append((pictures, models))
        return {
            "runs": [
                {"model": m, "direction": d, "status": "ok", "median_s": s, "peak_mib": 512.0}
                for m in models
                for d, s in SECONDS.items()
            ]
        }

    monkeypatch.setattr(bench_cpu, "measure_codec", measure_codec)
    return asked


def rows_of(markdown: str, first: str) -> list[list[str]]:
    """The rows of tables that begin with a cell."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0] == first]


def test_markdown_page(measured, tmp_path):
    output = tmp_path / "complexity.md"
    assert complexity.main(["tiny", "small", "--time", "--markdown", "-o", str(output)]) == 0
    page = output.read_text()
    assert measured == [(((768, 512),), ("tiny", "small"))]
    totals, run, _ = rows_of(page, "`tiny`")
    total = complexity.count("tiny", 768, 512)["total"]
    assert totals[1] == f"{total.params / 1e6:.3f}"
    assert totals[3] == f"{(total.macs + 18 * total.scan) / 1e9:.2f}"
    assert run == ["`tiny`", "trained", "1.50", "512", "2.25", "512"]
    assert rows_of(page, "`small`")[1][1] == "random"
    for codec in PUBLISHED_CODECS:
        assert rows_of(page, codec.name) == [
            [codec.name, codec.params, codec.macs, codec.times, codec.source]
        ]


def test_shares_of_the_modules_make_the_whole(capsys):
    assert complexity.main(["tiny", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "Time and memory" not in page
    shares = re.findall(r"\| ([\d.]+)% \| ([\d.]+)% \|", page)
    for column in zip(*shares, strict=True):
        assert sum(map(float, column)) == pytest.approx(100, abs=0.5)


def test_json_has_everything(measured, capsys):
    assert complexity.main(["tiny", "--time", "--json", "--size", "128x64"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert measured == [(((128, 64),), ("tiny",))]
    assert content["size"] == [128, 64] and content["models"]["tiny"]["total"]["params"] > 4e6
    for direction, seconds in SECONDS.items():
        assert content["runs"]["tiny"][direction]["seconds"] == seconds
    assert len(content["published"]) == len(PUBLISHED_CODECS)
    assert content["meta"]["command"].startswith("python tools/complexity.py tiny")


def test_the_page_is_the_same_from_the_json(measured, tmp_path, capsys):
    """Nothing is measured anew; who made it, and how, is said as of then."""
    file = tmp_path / "complexity.json"
    assert complexity.main(["tiny", "--time", "--json", "--size", "128x64", "-o", str(file)]) == 0
    found = complexity.Findings.from_json(file)
    measured.clear()
    assert complexity.main(["--read", str(file), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert not measured and page == found.to_markdown()
    assert found.costs == {"tiny": complexity.count("tiny", 128, 64)} and found.size == (128, 64)
    assert "1.50" in rows_of(page, "`tiny`")[1] and "complexity.py tiny --time --json" in page
    assert complexity.main(["--read", str(file), "--json"]) == 0
    assert capsys.readouterr().out == file.read_text()


@pytest.mark.parametrize("content", [None, "{}", "[]", "no JSON", '{"size": [1, 2], "models": 3}'])
def test_other_files_are_refused(tmp_path, capsys, content):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        complexity.main(["--read", str(file)])
    assert stopped.value.code == 2 and "other.json" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said(monkeypatch, capsys):
    runs = [
        {"model": "tiny", "direction": "encode", "status": "failed: for want of memory"},
        {"model": "tiny", "direction": "decode", "status": "not run: there is no file"},
    ]
    monkeypatch.setattr(bench_cpu, "measure_codec", lambda *_: {"runs": runs})
    assert complexity.main(["tiny", "--time"]) == 1
    printed = capsys.readouterr().out
    assert "failed: for want of memory" in printed and "not run: there is no file" in printed


def test_a_real_measurement(monkeypatch, capsys):
    """In this process, as tests/test_bench_cpu.py has those that start new ones."""
    monkeypatch.setattr(bench_cpu, "in_fresh_process", lambda call, *arguments: call(*arguments))
    assert complexity.main(["tiny", "--time", "--size", "64x64"]) == 0
    *_, encode, _, decode, _ = rows_of(capsys.readouterr().out, "`tiny`")[1]
    assert float(encode) > 0 and float(decode) > 0
