"""The pages say what the results say: tables that are made, and tables that are kept by hand."""

import json
import re
import shutil
from pathlib import Path

import pytest
import rd_curves
import readme_tables
from markdown_table import signed
from published_costs import PUBLISHED_CODECS
from readme_tables import BENCHMARKS, BLOCK, FOLDERS, JPEG, OURS, TABLES, VTM

from cmamba_ref import CMambaError

FILES = (*FOLDERS, "published_kodak")


def rows_of(table: str, first: str, column: int = 0) -> list[list[str]]:
    """The rows of a table that have this in a column."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[column : column + 1] == [first]]


def table_of(root: Path, page: str, name: str) -> str:
    """A table of a page."""
    return {match[2]: match[3] for match in BLOCK.finditer((root / page).read_text())}[name]


@pytest.fixture
def results(root: Path, tmp_path: Path) -> Path:
    """A copy of the results of the repository, to be changed."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in FILES:
        shutil.copy(root / "benchmarks" / f"{name}.json", folder)
    return folder


def edit(folder: Path, change) -> dict:
    path = folder / "kodak_tiny.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def expected_of(results: Path) -> list[str]:
    """Our BD-rates by PSNR on Kodak, against JPEG and against AVIF, from the table of Kodak."""
    table = TABLES["bd_rates"](results, "")
    ((_, ours, *_),) = rows_of(table, "CMamba tiny")
    ((_, _, _, against, _),) = rows_of(table, "AVIF 4:4:4, speed 4, tune psnr")
    return [ours, against]


# ---------------------------------------------------------------- made from the results


def test_the_pages_agree_with_the_results(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("README.md", ["kodak"]),
        ("docs/benchmarks.md", ["bd_rates", "folders", "published"]),
        ("cmamba_ref/pretrained/tiny/README.md", ["kodak"]),
    ],
)
def test_a_table_that_differs_is_renewed(root, page, tables):
    text = (root / page).read_text()
    assert sorted(match[2] for match in BLOCK.finditer(text) if match[2] in TABLES) == tables
    # Of `published` most is kept by hand, so that it cannot be made from nothing.
    made = {"kodak", "bd_rates", "folders"}
    worn = BLOCK.sub(lambda m: f"{m[1]}outdated\n{m[4]}" if m[2] in made else m[0], text)
    assert worn != text and readme_tables.filled(worn, BENCHMARKS) == text


def test_rates_beside_jpeg_at_the_same_psnr(results):
    """Where ours is JPEG at half its rate, half of JPEG's rate is in the table."""

    def halved(content):
        jpeg, ours = content[JPEG]["results"], content[OURS]["results"]
        for key in ("psnr-rgb", "ms-ssim-rgb"):
            ours[key] = jpeg[key][1:9]
        ours["bpp"] = [rate / 2 for rate in jpeg["bpp"][1:9]]

    jpeg = edit(results, halved)[JPEG]["results"]
    for k in range(8):
        ((_, bpp, psnr, _, baseline, against, _),) = rows_of(
            TABLES["kodak"](results, ""), str(k + 1)
        )
        assert baseline == f"{jpeg['bpp'][k + 1]:.3f}" and against == "−50 %"
        assert bpp == f"{jpeg['bpp'][k + 1] / 2:.3f}" and psnr == f"{jpeg['psnr-rgb'][k + 1]:.2f}"
    table = TABLES["bd_rates"](results, "")
    assert rows_of(table, "CMamba tiny") == [["CMamba tiny", "−50.0 %", "−50.0 %", "–", "–"]]
    ((_, *jpeg_cells),) = rows_of(table, "JPEG 4:2:0, optimised tables")
    assert jpeg_cells == ["0.0 %", "0.0 %", "−50.0 %", "−50.0 %"]


def test_what_jpeg_does_not_reach_is_not_compared(results):
    def better(content):
        content[OURS]["results"]["psnr-rgb"][-1] = 60.0

    edit(results, better)
    assert rows_of(TABLES["kodak"](results, ""), "8")[0][4:6] == ["–", "–"]


def test_bd_rates_are_those_that_the_evaluation_found(results):
    """`eval_rd` computed them from the same points, and wrote them into `meta`."""
    found = json.loads((results / "kodak_tiny.json").read_text())["meta"]["bd_rates"]
    table = TABLES["bd_rates"](results, "")
    for column, metric in enumerate(("psnr", "ms-ssim"), 1):
        for codec in found[metric]["codecs"]:
            ((*cells,),) = rows_of(table, codec["label"])
            assert cells[column] == signed(codec["bd_rate"]["percent"])


def test_folders(results):
    """The row of Kodak agrees with its own table, every row with what the evaluation found."""
    table = TABLES["folders"](results, "")
    ((_, images, ours, *_, against),) = rows_of(table, "Kodak")
    assert [images, ours, against] == ["24", *expected_of(results)]
    (heading,) = rows_of(table, "images")  # without its first cell, which is empty
    for stem, name in FOLDERS.items():
        ((*cells,),) = rows_of(table, name)
        meta = json.loads((results / f"{stem}.json").read_text())["meta"]
        for codec in meta["bd_rates"]["psnr"]["codecs"]:
            cell = cells[1 + heading.index(codec["label"])]
            assert cell == signed(codec["bd_rate"]["percent"])


def test_folders_of_other_weights_are_refused(results):
    def other(content):
        content["meta"]["models"][OURS][0]["id"] = "0" * 16

    edit(results, other)
    with pytest.raises(CMambaError, match="cbsd68_tiny.json was not measured with the bundled"):
        TABLES["folders"](results, "")


def test_only_our_row_of_the_published_codecs_is_renewed(root, results):
    before = "| measured | CMamba tiny | 1 | – | 4.33 | 19.1 G | 2 | f |\n| published | x | 1 |\n"

    def slower(content):
        content[OURS]["results"]["encoding_time"] = [1.0, 2.0] * 4

    edit(results, slower)
    ours, other = TABLES["published"](results, before).splitlines()
    assert other == before.splitlines()[1]
    assert re.fullmatch(
        r"\| measured \| CMamba tiny \| [+−][\d.]+ % \| – \| 4.33 \| 19.1 G \| "
        r"encoding 1.500 s, decoding .*, mean over all points \| f \|",
        ours,
    )


def test_a_missing_result_is_named(results, monkeypatch, capsys):
    (results / "kodak_tiny.json").unlink()
    monkeypatch.setattr(readme_tables, "BENCHMARKS", results)
    with pytest.raises(SystemExit) as stopped:
        readme_tables.main(["--check"])
    assert stopped.value.code == 2 and "kodak_tiny.json" in capsys.readouterr().err


def test_signs():
    values = (-3.14, 2.0, -0.04, 0.0, None)
    assert [signed(value) for value in values] == ["−3.1 %", "+2.0 %", "0.0 %", "0.0 %", "–"]


# ---------------------------------------------------------------- kept by hand


def test_scans(root):
    rows = json.loads((root / "benchmarks" / "cpu.json").read_text())["sections"]["scan"]["rows"]
    table = table_of(root, "docs/benchmarks.md", "scans")
    ((_, forward, both, _),) = rows_of(table, "`chunked`, eager PyTorch")
    for mode, cell in (("forward", forward), ("both", both)):
        (row,) = [r for r in rows if r["backend"] == "chunked" and r["mode"] == mode]
        assert float(cell) == pytest.approx(row["median_ms"] / 1e3, rel=5e-3)


def test_complexity(root):
    models = json.loads((root / "benchmarks" / "complexity.json").read_text())["models"]
    table = table_of(root, "docs/model.md", "complexity")
    for name, model in models.items():
        total = model["total"]
        ((_, params, *macs),) = rows_of(table, f"`{name}`")
        assert params == f"{total['params'] / 1e6:.2f} M"
        assert macs == [f"{(total['macs'] + k * total['scan']) / 1e9:.1f} G" for k in (0, 18, 36)]


def test_ablation(root):
    variants = json.loads((root / "benchmarks" / "ablation.json").read_text())["variants"]
    table = table_of(root, "docs/benchmarks.md", "ablation")
    for row in variants:
        (cells,) = rows_of(table, f"`{row['variant']}`")
        assert cells[2] == f"{row['bd_rate']['psnr'][0]:+.1f} %"
        assert cells[4] == f"{row['parameters'] / 1e6:.2f}"


def test_published_codecs(root):
    """BD-rates are those of the points that are stored, statements those of the list."""
    table = table_of(root, "docs/benchmarks.md", "published")
    curves = rd_curves.load_curves(str(root / "benchmarks" / "published_kodak.json"))
    points = {curve.name: curve for curve in curves}
    for codec in PUBLISHED_CODECS:
        ((kind, _, rate, stated, params, macs, *_),) = rows_of(table, codec.name, 1)
        assert (kind, stated) == ("published", codec.bd_rate)
        assert (params, macs) == (codec.params, codec.macs)
        found = "–"
        if codec.curve:
            found = signed(readme_tables.rate(points[VTM], points[codec.curve], "psnr"))
        assert rate == found
