"""The fuzzer: it notices what goes wrong and saves it; its examples still hold."""

import dataclasses
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fuzzer's limits are Linux's", allow_module_level=True)

import fuzz
import numpy as np
from codec_helpers import TESTS, run_elsewhere
from fuzz import TARGETS, UnexpectedError
from PIL import Image

from cmamba_ref import ImageError

EXAMPLES = json.loads((TESTS / "hostile_examples.json").read_text())


@pytest.mark.parametrize("name", sorted({name for name, _, _ in EXAMPLES}))
def test_examples_end_as_they_did(name):
    """One small input for each outcome that a run of the fuzzer has seen."""
    for _, outcome, data in (e for e in EXAMPLES if e[0] == name):
        target = TARGETS[name]
        try:
            text = target.use(bytes.fromhex(data))
        except target.errors as error:
            text = f"{type(error).__name__}: {error}"
        found = fuzz.template(text)
        if "cannot read the weights" in outcome:  # the rest is another library's text
            found, outcome = (t.partition(":")[0] for t in (found, outcome))
        if name == "photograph":  # Pillow's versions differ in what they take, and in the reason
            assert found.startswith(("ImageError: ", "colour", "grey"))
            continue
        assert found == outcome


def misbehaving(data: bytes) -> str:
    """Do what the input says."""
    if data == b"crash":
        os._exit(7)
    if data == b"segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"loop":
        while True:
            pass
    if data == b"sleep":
        time.sleep(600)
    if data == b"fill":
        bytearray(2 * fuzz.MEMORY_LIMIT)
    if data == b"grow":
        bytes(100 << 20)
        bytearray(b"x" * (100 << 20))
    if data == b"raise":
        raise ZeroDivisionError
    if data == b"wrong":
        raise UnexpectedError("wrong")
    return "symbols"


def misbehave(report: Path) -> None:
    """Runs in the other process: every way to go wrong, with a good trial after each."""
    TARGETS["rANS stream"] = dataclasses.replace(TARGETS["rANS stream"], use=misbehaving)
    fuzz.SECONDS_LIMIT = 1
    kinds = ("crash", "segfault", "loop", "fill", "raise", "wrong", "grow")
    # After each a good trial.
    inputs = [("rANS stream", data) for kind in kinds for data in (kind.encode(), b"well")]
    trials = list(fuzz.attempt(inputs))
    assert all(trial[:2] == ("symbols", "") for trial in trials[1::2])
    fuzz.DEADLINE = 3.0
    (slept,) = fuzz.attempt([("rANS stream", b"sleep")])
    report.write_text(json.dumps({**dict(zip(kinds, trials[::2], strict=True)), "sleep": slept}))


def test_whatever_goes_wrong_is_a_finding_and_ends_nothing(tmp_path):
    run_elsewhere("test_fuzz.misbehave", tmp_path / "report.json")
    trials = json.loads((tmp_path / "report.json").read_text())
    for kind, reason in {
        "crash": "died with exit code 7",
        "segfault": "died with SIGSEGV",
        "loop": "died with SIGPROF",
        "sleep": "no end within 3.0 s",
        "fill": "MemoryError",
        "raise": "ZeroDivisionError",
        "wrong": "UnexpectedError: wrong",
    }.items():
        _, finding, *_ = trials[kind]
        assert reason in finding, kind
        if kind in ("fill", "raise", "wrong"):
            assert "test_fuzz.py" in finding, kind  # where it was
    outcome, finding, _, memory = trials["grow"]
    assert (outcome, finding) == ("symbols", "") and memory > 90 << 20


def fuzz_a_little(folder: Path) -> None:
    """Runs in the other process: one seed twice, another one, and a run with findings."""
    common = ["--trials", "25", "--findings", str(folder / "findings")]
    for seed, output in (("3", "a.json"), ("3", "b.json"), ("4", "c.json")):
        examples = ["--examples", str(folder / "examples.json")]
        assert fuzz.main([*common, *examples, "--seed", seed, "-o", str(folder / output)]) == 0
    assert not (folder / "findings").exists()
    TARGETS["rANS stream"] = dataclasses.replace(TARGETS["rANS stream"], use=lambda data: 1 // 0)
    assert fuzz.main([*common, "--seed", "5"]) == 1
    (saved, *_) = sorted((folder / "findings").glob("*.bin"))
    assert fuzz.main(["--replay", str(saved)]) == 1


@pytest.mark.slow
def test_runs_repeat_and_findings_are_saved(tmp_path):
    run_elsewhere("test_fuzz.fuzz_a_little", tmp_path)
    a, b, c = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "abc")
    assert a["outcomes"] == b["outcomes"] != c["outcomes"] and a["findings"] == []
    sound = sum(len(target.seeds()) for target in TARGETS.values())
    assert a["trials"] == 25 + sound == sum(sum(n.values()) for n in a["outcomes"].values())
    assert a["slowest"]["seconds"] > 0 and a["largest"]["bytes"] > 0
    (finding, *_) = findings = sorted((tmp_path / "findings").glob("*.txt"))
    assert "ZeroDivisionError" in finding.read_text() and finding.with_suffix(".bin").exists()
    assert len(findings) <= 5  # of a kind
    rows = json.loads((tmp_path / "examples.json").read_text())
    assert {"container", "header", "forged symbols"} <= {name for name, _, _ in rows}
    assert all(outcome in c["outcomes"][name] for name, outcome, _ in rows)
    assert max(len(data) for *_, data in rows) <= 2 * fuzz.MOST_EXAMPLE_BYTES


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_vary_and_leave_what_they_are_drawn_from_alone(name):
    """A list put into a configuration was once changed in place, until it held itself."""
    target, rng = TARGETS[name], np.random.default_rng(0)
    seeds = target.seeds()
    before = list(seeds)
    found = {target.mutate(seeds[k % len(seeds)], seeds, rng) for k in range(300)}
    assert len(found) > 200 and seeds == before == target.seeds()


def test_inputs_do_not_depend_on_the_time():
    before = {name: target.seeds() for name, target in TARGETS.items()}
    time.sleep(1.1)  # profiles have the second in which they were made
    for name, target in TARGETS.items():
        assert target.seeds() == before[name]
    profile = Image.open(io.BytesIO(TARGETS["photograph"].seeds()[0])).info["icc_profile"]
    assert profile[24:36] == bytes(12)


def test_checksums_of_png_chunks_are_made_right():
    target = TARGETS["photograph"]
    for seed in target.seeds():
        assert fuzz.with_png_checksums(seed) == seed
    png = bytearray(target.seeds()[1])
    png[45] ^= 1  # in the palette
    with pytest.raises(ImageError):
        target.use(bytes(png))
    assert target.use(fuzz.with_png_checksums(bytes(png))) == "colour"


def test_the_template_keeps_reasons_and_drops_values():
    one = "WeightsError: '/tmp/x': g_a.0.weight is torch.int8[3, 4], the configuration has [1]"
    two = "WeightsError: '/other/y': h_s.weight is torch.int32[7], the configuration has [2, 2]"
    assert fuzz.template(one) == fuzz.template(two)
    assert fuzz.template(one) != fuzz.template(one.replace("is", "lacks"))
