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
    """The measurement replaced by known figures; the list of what it was asked for."""
    asked = []

    def measure_codec(sizes, models, settings):
        asked.append((sizes, models))
        figures = {"status": "ok", "peak_mib": 512.0}
        runs = [
            {"model": model, "direction": direction, "median_s": seconds, **figures}
            for model in models
            for direction, seconds in SECONDS.items()
        ]
        return {"runs": runs}

    monkeypatch.setattr(bench_cpu, "measure_codec", measure_codec)
    return asked


def rows_of(markdown: str, first: str) -> list[list[str]]:
    """The rows of tables that begin with a cell."""
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0] == first]


def test_the_page_from_the_json_of_an_earlier_run(measured, tmp_path, capsys):
    """Nothing is measured anew; who made it, and how, is said as of then."""
    file, page = tmp_path / "complexity.json", tmp_path / "complexity.md"
    models = ["tiny", "small"]
    assert complexity.main([*models, "--time", "--json", "-o", str(file)]) == 0
    assert measured == [([(768, 512)], models)]
    content = json.loads(file.read_text())
    assert content["size"] == [768, 512]
    for direction, seconds in SECONDS.items():
        assert content["runs"]["tiny"][direction]["seconds"] == seconds
    assert len(content["published"]) == len(PUBLISHED_CODECS)

    measured.clear()
    assert complexity.main(["--read", str(file), "--markdown", "-o", str(page)]) == 0
    assert not measured
    text = page.read_text()
    assert "complexity.py tiny small --time --json" in text
    totals, run, _ = rows_of(text, "`tiny`")
    total = complexity.count("tiny", 768, 512)["total"]
    assert totals[1] == f"{total.params / 1e6:.3f}"
    assert totals[3] == f"{(total.macs + 18 * total.scan) / 1e9:.2f}"
    assert run == ["`tiny`", "trained", "1.50", "512", "2.25", "512"]
    assert rows_of(text, "`small`")[1][1] == "random"
    for codec in PUBLISHED_CODECS:
        assert rows_of(text, codec.name) == [
            [codec.name, codec.params, codec.macs, codec.times, codec.source]
        ]


def test_shares_of_the_modules_make_the_whole(capsys):
    assert complexity.main(["tiny", "--size", "128x64"]) == 0
    page = capsys.readouterr().out
    assert "At 128x64" in page and "Time and memory" not in page
    shares = re.findall(r"\| ([\d.]+)% \| ([\d.]+)% \|", page)
    for column in zip(*shares, strict=True):
        assert sum(map(float, column)) == pytest.approx(100, abs=0.5)


def test_failures_are_in_the_table_and_the_exit_status(monkeypatch, capsys):
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
