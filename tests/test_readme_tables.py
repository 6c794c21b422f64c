"""The README says what the results say: its tables are those that the JSONs give."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import readme_tables
from readme_tables import BLOCK, TABLES, Results, filled, signed


def rows_of(table: str, first: str) -> list[list[str]]:
    """The rows of a table that begin with a cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    return [line for line in lines if line[0] == first]


@pytest.fixture
def results(root: Path, tmp_path: Path) -> Results:
    """A copy of the results of the repository, to be changed."""
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("kodak_tiny", "cpu", "complexity", "ablation", "published_kodak"):
        shutil.copy(root / "benchmarks" / f"{name}.json", folder)
    return Results(folder)


def edit(results: Results, name: str, change) -> None:
    content = results.read(name)
    change(content)
    (results.folder / name).write_text(json.dumps(content))


def test_readme_agrees_with_the_results(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_table_that_differs_is_named_and_made_anew(root, results, tmp_path, capsys):
    texts = {page: (root / page).read_text() for page in readme_tables.PAGES}
    for page, text in texts.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(text.replace("| 1 | 0.", "| 1 | 9.", 1))
    arguments = ["--pages", str(tmp_path), "--results", str(results.folder)]
    assert readme_tables.main([*arguments, "--check"]) == 1
    error = capsys.readouterr().err
    assert all(f"{page}: kodak is out of date" in error for page in texts)
    assert all("| 1 | 9." in (tmp_path / page).read_text() for page in texts)
    assert readme_tables.main(arguments) == 0
    assert all((tmp_path / page).read_text() == text for page, text in texts.items())
    assert capsys.readouterr().out.count("kodak changed") == len(texts) == 2
    assert readme_tables.main([*arguments, "--check"]) == 0


def test_a_new_result_makes_tables_out_of_date(root, results, capsys):
    def slower(content):
        content["sections"]["scan"]["rows"][0]["median_ms"] *= 2

    edit(results, "cpu.json", slower)
    assert readme_tables.main(["--check", "--results", str(results.folder)]) == 1
    error = capsys.readouterr().err
    assert "scans is out of date" in error and "kodak" not in error


def test_rates_beside_jpeg_at_the_same_psnr(results):
    """Where ours is JPEG at half its rate, half of JPEG's rate is what the table says."""

    def halved(content):
        jpeg, ours = content["jpeg420"]["results"], content["cmamba"]["results"]
        for key in ("psnr-rgb", "ms-ssim-rgb"):
            ours[key] = jpeg[key][1:9]
        ours["bpp"] = [rate / 2 for rate in jpeg["bpp"][1:9]]

    edit(results, "kodak_tiny.json", halved)
    jpeg = results.kodak["jpeg420"]["results"]
    for k in range(8):
        ((_, bpp, psnr, _, rival, against, _),) = rows_of(TABLES["kodak"](results), str(k + 1))
        assert rival == f"{jpeg['bpp'][k + 1]:.3f}" and against == "−50 %"
        assert bpp == f"{jpeg['bpp'][k + 1] / 2:.3f}" and psnr == f"{jpeg['psnr-rgb'][k + 1]:.2f}"
    table = TABLES["bd_rates"](results)
    assert rows_of(table, "CMamba tiny") == [["CMamba tiny", "−50.0 %", "−50.0 %", "–", "–"]]
    ((_, *jpeg_cells),) = rows_of(table, "JPEG 4:2:0, optimised tables")
    assert jpeg_cells == ["0.0 %", "0.0 %", "−50.0 %", "−50.0 %"]


def test_what_jpeg_does_not_reach_is_not_compared(results):
    def better(content):
        content["cmamba"]["results"]["psnr-rgb"][-1] = 60.0

    edit(results, "kodak_tiny.json", better)
    assert rows_of(TABLES["kodak"](results), "8")[0][4:6] == ["–", "–"]


def test_bd_rates_are_those_that_the_evaluation_found(results):
    """`eval_rd` computed them from the same points, and wrote them into `meta`."""
    found = results.kodak["meta"]["bd_rates"]
    table = TABLES["bd_rates"](results)
    for column, metric in enumerate(("psnr", "ms-ssim"), 1):
        for codec in found[metric]["codecs"]:
            ((*cells,),) = rows_of(table, codec["label"])
            assert cells[column] == signed(codec["bd_rate"]["percent"])


def test_costs_and_times_of_our_models(results):
    run = {"status": "ok", "peak_mib": 2048.0, "has_trained_weights": False}

    def timed(content):
        content["runs"]["base"] = {
            "encode": {**run, "seconds": 12.345},
            "decode": {**run, "seconds": 9.876},
        }

    edit(results, "complexity.json", timed)
    table = TABLES["complexity"](results)
    total = results.read("complexity.json")["models"]["base"]["total"]
    ((_, params, *macs),) = rows_of(table, "`base`")
    assert params == f"{total['params'] / 1e6:.2f} M"
    assert macs == [f"{(total['macs'] + k * total['scan']) / 1e9:.1f} G" for k in (0, 18, 36)]
    assert rows_of(table, "`base`, random weights")[0][1:] == [
        "12.3 s",
        "2.00 GiB",
        "9.88 s",
        "2.00 GiB",
    ]


def test_variants_stand_beside_what_they_are_compared_with(results):
    table = TABLES["ablation"](results)
    assert rows_of(table, "`ca-ssm`")[0][2:4] == ["+0.0 %", "+0.0 %"]
    for row in results.read("ablation.json")["variants"]:
        (cells,) = rows_of(table, f"`{row['variant']}`")
        assert cells[2] == f"{row['bd_rate']['psnr'][0]:+.1f} %"
        assert cells[4] == f"{row['parameters'] / 1e6:.2f}"


def test_measured_and_published_are_not_mixed(results):
    table = TABLES["published"](results)
    kinds = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert set(kinds) == {"measured", "published"}
    assert kinds == sorted(kinds)
    published = [row for row in rows_of(table, "published") if row[1] == "MLIC++"]
    ((_, _, rate, stated, *_),) = published
    # Computed by others from the same points: -15.0.
    assert rate == "−15.0 %" and stated == "−13.39, VTM-17"
    assert [row[2] for row in rows_of(table, "published") if row[1] == "VTM-9.1"] == ["0.0 %"]
    times = [row[6] for row in rows_of(table, "measured") if row[1] == "CMamba tiny"]
    measured = results.kodak
    encoding = np.mean(measured["cmamba"]["results"]["encoding_time"])
    assert (
        times[0].startswith(f"encoding {encoding:.3f} s")
        and measured["meta"]["machine"] in (times[0])
    )


def test_the_readme_must_have_each_table_once(root, results):
    text = (root / "README.md").read_text()
    scans = next(match[0] for match in BLOCK.finditer(text) if match[1] == "scans")
    for wrong in (
        text.replace(scans, ""),
        text.replace(scans, scans + scans),
        text.replace("table: scans", "table: skans"),
    ):
        with pytest.raises(readme_tables.TableError, match="each of the tables"):
            filled(wrong, results)


def test_a_missing_result_is_named(results, capsys):
    (results.folder / "cpu.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        readme_tables.main(["--check", "--results", str(results.folder)])
    assert stopped.value.code == 2
    assert re.search("cpu.json must be a result in results", capsys.readouterr().err)


def test_signs():
    assert [signed(value) for value in (-3.14, 2.0, -0.04, 0.0, None)] == [
        "−3.1 %",
        "+2.0 %",
        "0.0 %",
        "0.0 %",
        "–",
    ]
