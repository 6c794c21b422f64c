"""The fuzzer: it notices what goes wrong, keeps it, and adds runs up; its examples still hold.

Where it works, it does so in a process of its own: it forks, and this one may have threads.
"""

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
import fuzz_targets
import fuzz_worker
import numpy as np
from codec_helpers import TESTS, run_elsewhere
from fuzz_targets import TARGETS, UnexpectedError
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
        found = fuzz_worker.template(text)
        if "cannot read the weights" in outcome:  # the rest is another library's text
            found, outcome = (t.partition(":")[0] for t in (found, outcome))
        if name == "photograph":  # Pillow's versions differ in what they take, and in the reason
            assert found.startswith(("ImageError: ", "colour", "grey"))
            continue
        assert found == outcome


class Misbehaving(fuzz_targets.Stream):
    """Does what its input says."""

    def seeds(self) -> list[bytes]:
        return [b"well"]

    def use(self, data: bytes) -> str:
        if data == b"crash":
            os._exit(7)
        if data == b"loop":
            while True:
                pass
        if data == b"segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == b"sleep":
            time.sleep(600)
        if data == b"fill":
            bytearray(2 * fuzz_worker.MEMORY_LIMIT)
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
    TARGETS["rANS stream"] = Misbehaving()
    fuzz_worker.SECONDS_LIMIT = 1
    worker = fuzz_worker.Worker()
    trials = {}
    for data in ("crash", "segfault", "loop", "sleep", "fill", "raise", "wrong", "grow"):
        worker.deadline = 3.0 if data == "sleep" else fuzz_worker.DEADLINE
        trial = worker.run("rANS stream", data.encode())
        worker.deadline = fuzz_worker.DEADLINE  # on a busy machine a good trial takes long as well
        after = worker.run("rANS stream", b"well")
        trials[data] = [trial.outcome, trial.finding, trial.memory, after.outcome, after.finding]
    worker.stop()
    report.write_text(json.dumps(trials))


def test_whatever_goes_wrong_is_a_finding_and_ends_nothing(tmp_path):
    run_elsewhere("test_fuzz.misbehave", tmp_path / "report.json")
    trials = json.loads((tmp_path / "report.json").read_text())
    for data, reason in {
        "crash": "the process died with exit code 7",
        "segfault": "the process died with SIGSEGV",
        "loop": "the process died with SIGPROF",
        "sleep": "no end within 3.0 s",
        "fill": "MemoryError",
        "raise": "ZeroDivisionError",
        "wrong": "UnexpectedError: wrong",
    }.items():
        assert reason in trials[data][1], data
        if data not in ("crash", "fill"):
            assert "test_fuzz.py" in trials[data][1], data  # where it was
    outcome, finding, memory, *_ = trials["grow"]
    assert (outcome, finding) == ("symbols", "") and memory > 90 << 20
    assert all(trial[3:] == ["symbols", ""] for trial in trials.values())


def fuzz_a_little(folder: Path) -> None:
    """Runs in the other process: one seed twice, another one added, and one with a finding."""
    common = ["--trials", "25", "--findings", str(folder / "findings")]
    for seed, output in (("3", "a.json"), ("3", "b.json"), ("4", "b.json")):
        assert fuzz.main([*common, "--seed", seed, "-o", str(folder / output)]) == 0
    try:
        fuzz.main([*common, "--seed", "3", "-o", str(folder / "b.json")])
    except SystemExit as refused:
        assert refused.code == 2
    else:
        raise AssertionError("a seed was counted twice")
    assert not (folder / "findings").exists()
    TARGETS["rANS stream"].use = lambda data: 1 // 0  # type: ignore[method-assign, assignment]
    assert fuzz.main([*common, "--seed", "5"]) == 1


@pytest.mark.slow
def test_runs_repeat_and_add_up(tmp_path):
    run_elsewhere("test_fuzz.fuzz_a_little", tmp_path)
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["runs"][0]["outcomes"] == b["runs"][0]["outcomes"]
    assert [run["seed"] for run in b["runs"]] == [3, 4]
    sound = sum(len(target.seeds()) for target in TARGETS.values())
    assert b["total"]["trials"] == 2 * (25 + sound) == 2 * a["total"]["trials"]
    assert b["total"]["findings"] == 0 and b["total"]["slowest"]["seconds"] > 0
    reached, possible = b["total"]["lines_reached"]["codec/container.py"].split(" of ")
    assert 10 < int(reached) <= int(possible)
    (finding, *_) = sorted((tmp_path / "findings").glob("*.txt"))
    assert "ZeroDivisionError" in finding.read_text() and finding.with_suffix(".bin").exists()


def test_an_earlier_run_may_lack_a_target():
    def run(**outcomes: dict[str, int]) -> dict[str, object]:
        return {
            "outcomes": outcomes,
            "minutes": 1.0,
            "processor_seconds": {},
            "findings": [],
            "slowest": {"seconds": 0.0},
            "largest": {"bytes": 0},
            "sources": "",
        }

    total = fuzz.summed_up([run(header={"a": 2}), run(header={"a": 1, "b": 1}, tables={"c": 5})])
    assert total["trials"] == 9 and total["minutes"] == 2.0
    assert total["trials_by_target"]["header"] == 4 and total["trials_by_target"]["tables"] == 5
    assert total["distinct_outcomes_by_target"]["header"] == 2


def test_damage_leaves_what_it_is_drawn_from_alone():
    """A list put into a configuration was changed in place, until it held itself."""
    before = repr(fuzz_targets._VALUES)
    target = TARGETS["config.json"]
    data, rng = target.seeds()[0], np.random.default_rng(0)
    for _ in range(5000):
        target.damaged(data, [data], rng)
    assert repr(fuzz_targets._VALUES) == before


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
        assert fuzz_targets._with_png_checksums(seed) == seed
    png = bytearray(target.seeds()[1])
    png[45] ^= 1  # in the palette
    with pytest.raises(ImageError):
        target.use(bytes(png))
    assert target.use(fuzz_targets._with_png_checksums(bytes(png))) == "colour"


def test_the_template_keeps_reasons_and_drops_values():
    one = "WeightsError: '/tmp/x': g_a.0.weight is torch.int8[3, 4], the configuration has [1]"
    two = "WeightsError: '/other/y': h_s.weight is torch.int32[7], the configuration has [2, 2]"
    assert fuzz_worker.template(one) == fuzz_worker.template(two)
    assert fuzz_worker.template(one) != fuzz_worker.template(one.replace("is", "lacks"))
