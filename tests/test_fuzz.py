"""Hostile inputs for every target of the fuzzer: kept ones, drawn ones, those of a short run."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the fuzzer's limit of memory is Linux's", allow_module_level=True)

import fuzz_targets
import torch
from codec_helpers import TESTS, run_elsewhere, run_python
from fuzz_targets import TARGETS, Target, UnexpectedError, change_all

EXAMPLES = json.loads((TESTS / "hostile_examples.json").read_text())


def outcome(target: Target, data: bytes) -> str:
    """The result, or type and message of an error that the target may raise."""
    try:
        return target.use(data)
    except target.errors as error:
        return f"{type(error).__name__}: {error}"


def template(text: str) -> str:
    """A message without the parts that differ from input to input."""
    text = re.sub(r"""'[^']*'|"[^"]*"|\[[^\]]*\]""", "…", text)
    word = re.compile(r"[`(]*[A-Za-z][A-Za-z-]*[`);:,.]*")
    words = [w if word.fullmatch(w) else "…" for w in text.split()]
    return re.sub(r"(… )+", "… ", " ".join(words))[:90].strip()


@pytest.mark.parametrize("name", sorted({name for name, _, _ in EXAMPLES}))
def test_examples_end_as_they_did(name):
    """One small input for each outcome that an earlier fuzzer has seen."""
    for _, expected, data in (e for e in EXAMPLES if e[0] == name):
        found = template(outcome(TARGETS[name], bytes.fromhex(data)))
        if name == "image":  # Pillow's versions differ in what they take, and in the reason
            assert found.startswith(("ImageError: ", "colour", "grey"))
            continue
        if "cannot read the weights" in expected:  # the rest is another library's text
            found, expected = (t.partition(":")[0] for t in (found, expected))
        assert found == expected


def spoil(data: bytes, rng: np.random.Generator) -> bytes:
    """The data with bits flipped, a piece replaced by noise, or the end missing."""
    kind, start = rng.integers(4), int(rng.integers(len(data) + 1))
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + rng.bytes(rng.integers(9)) + data[start + rng.integers(9) :]
    end = 34 if kind == 2 else len(data)  # few or many: the header of a file, or anywhere
    changed = bytearray(data)
    for bit in rng.integers(8 * min(end, len(data)), size=rng.integers(1, 9)) if data else ():
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def try_drawn_inputs(report: Path) -> None:
    """Runs in another process: inputs for all targets, with little memory."""
    torch.set_num_threads(1)
    seeds_of = {name: target.seeds() for name, target in TARGETS.items()}
    for name, seeds in seeds_of.items():  # without errors, and before the limit: loads the model
        assert all(map(TARGETS[name].use, seeds))
    fuzz_targets.limit_memory()
    rng, outcomes, slowest = np.random.default_rng(0), {}, 0.0
    for name, target in TARGETS.items():
        seeds, outcomes[name] = seeds_of[name], []
        for k in range(500 if name == "container" else 25):
            mutate = target.mutate if rng.integers(2) else change_all  # as the fuzzer does
            data = mutate(seeds[k % len(seeds)], lambda part: spoil(part, rng))
            start = time.process_time()
            outcomes[name].append(outcome(target, data))
            slowest = max(slowest, time.process_time() - start)
    report.write_text(json.dumps({"outcomes": outcomes, "slowest": slowest}))


def test_drawn_inputs_end_soundly_within_limits(tmp_path):
    run_elsewhere("test_fuzz.try_drawn_inputs", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["slowest"] < 5
    outcomes = {name: set(map(template, found)) for name, found in report["outcomes"].items()}
    assert outcomes.keys() == TARGETS.keys()
    uniform = [name for name, found in outcomes.items() if len(found) < 3]
    assert uniform in ([], ["forged-symbols"])  # these end in an image, nearly always
    reached = "\n".join(outcomes["container"])
    for reason in (
        "image", "signature", "version", "malformed", "made by model", "pixels", "cannot hold",
        "quality", "escape", "ends before", "left over", "checksum",
    ):  # fmt: skip
        assert reason in reached


@pytest.mark.parametrize("name", ["container", "tables", "safetensors-header"])
def test_a_mutation_that_changes_nothing_leaves_the_input_sound(name):
    target = TARGETS[name]
    for seed in target.seeds():
        assert target.use(target.mutate(seed, lambda part: part)) == target.use(seed)


def test_an_unexpected_result_is_an_error():
    for image in (np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.float32)):
        with pytest.raises(UnexpectedError):
            fuzz_targets.check_image(image, (3, 2, 3))


# The command, where atheris is installed.

FAULTY = """
import sys, fuzz, fuzz_targets
fuzz_targets.TARGETS["info"] = fuzz_targets.Target(lambda data: 1 // 0, (), lambda: [b"seed"])
fuzz.main()
"""


@pytest.fixture
def corpus(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    return tmp_path / "corpus"


def test_the_fuzzer_extends_its_corpus(corpus):
    command = [str(TESTS.parent / "tools" / "fuzz.py"), "rans-stream"]
    done = run_python(*command, str(corpus), "-runs=300", "-seed=1")
    assert done.returncode == 0, done.stderr
    assert len(list(corpus.iterdir())) > len(TARGETS["rans-stream"].seeds())
    one = run_python(*command, str(corpus / "seed-0"))
    assert one.returncode == 0 and "seed-0" in one.stderr


def test_the_fuzzer_saves_a_finding(corpus):
    done = run_python("-c", FAULTY, "info", str(corpus))
    assert done.returncode != 0 and "ZeroDivisionError" in done.stdout + done.stderr
    assert list(corpus.parent.glob("*-crash-*"))
