"""The fuzzer: it notices what goes wrong and saves it; its examples still hold."""

import dataclasses
import io
import json
import os
import signal
import sys
import time

import pytest

if sys.platform != "linux":
    pytest.skip("the fuzzer's limits are Linux's", allow_module_level=True)

import fuzz
import numpy as np
from codec_helpers import TESTS
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


def attempt_misbehaving(item: fuzz.Input) -> fuzz.Trial:
    """Runs in other processes, with limits that are soon reached."""
    fuzz.SECONDS_LIMIT, fuzz.DEADLINE = 1, 5.0 if item[1] == b"sleep" else 600.0
    target = dataclasses.replace(TARGETS["rANS stream"], use=misbehaving)
    return fuzz.attempt(item, {"rANS stream": target})


def test_whatever_goes_wrong_is_a_finding_and_ends_nothing():
    kinds = ("crash", "segfault", "loop", "sleep", "fill", "raise", "wrong", "grow", "well")
    trials: dict[str, fuzz.Trial] = {}

    def note(item: fuzz.Input, trial: fuzz.Trial) -> None:
        trials[item[1].decode()] = trial

    items = [("rANS stream", kind.encode()) for kind in kinds]
    fuzz.try_all(items, note, work=attempt_misbehaving)
    assert set(trials) == set(kinds)
    for kind in ("crash", "segfault", "loop", "sleep"):
        assert trials[kind].outcome == fuzz.DIED and trials[kind].finding, kind
    for kind, reason in (
        ("fill", "MemoryError"),
        ("raise", "ZeroDivisionError"),
        ("wrong", "UnexpectedError: wrong"),
    ):
        assert reason in trials[kind].finding and "test_fuzz.py" in trials[kind].finding, kind
    for kind in ("grow", "well"):
        assert trials[kind][:2] == ("symbols", "")
    assert trials["grow"].memory > 90 << 20 > trials["well"].memory


def wrong(_: fuzz.Input) -> fuzz.Trial:
    """Runs in other processes: every input is a finding."""
    return fuzz.Trial("ZeroDivisionError: …", "a traceback")


def test_findings_are_saved(tmp_path, monkeypatch, capsys):
    """Five of a kind, each with its reason, and tried again by name."""
    run = fuzz.Run(5, tmp_path / "findings")
    drawn = [run.draw() for _ in range(60)]
    fuzz.try_all(drawn, run.note, work=wrong)
    assert len(run.found) == run.as_json()["trials"] == 60
    saved = sorted((tmp_path / "findings").glob("rANS*.bin"))
    assert len(saved) == 5 and saved[0].with_suffix(".txt").read_text() == "a traceback"
    assert saved[0].read_bytes() in [data for name, data in drawn if name == "rANS stream"]
    assert fuzz.main(["--replay", str(saved[0])]) == 0
    assert "MiB" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_repeat(tmp_path):
    """One seed twice, and another one; the smallest input of each outcome is an example."""
    found = []
    for seed, name in (("3", "a"), ("3", "b"), ("4", "c")):
        output, examples = tmp_path / f"{name}.json", tmp_path / "examples.json"
        arguments = ["--trials", "25", "--seed", seed, "--findings", str(tmp_path / "findings")]
        assert fuzz.main([*arguments, "-o", str(output), "--examples", str(examples)]) == 0
        found.append(json.loads(output.read_text()))
    a, b, c = found
    assert not (tmp_path / "findings").exists() and a["findings"] == []
    assert a["outcomes"] == b["outcomes"] != c["outcomes"]
    sound = sum(len(target.seeds()) for target in TARGETS.values())
    assert a["trials"] == 25 + sound == sum(sum(n.values()) for n in a["outcomes"].values())
    assert a["slowest"]["seconds"] > 0 and a["largest"]["bytes"] > 0
    rows = json.loads(examples.read_text())
    assert {"container", "header", "config.json"} <= {name for name, _, _ in rows}
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
