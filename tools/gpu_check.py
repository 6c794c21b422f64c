"""Check everything on a GPU, within so many minutes and without a network.

    PYTHONPATH=. python tools/gpu_check.py --out gpu-check --minutes 10
    PYTHONPATH=. python tools/gpu_check.py --out gpu-check --stages compile backend tests

The checkout need not be installed.  Beyond torch for CUDA and triton it takes numpy, einops,
Pillow, safetensors, tqdm, pytest and hypothesis.  Each stage runs in a process of its own, so that
a crash ends none of the others, and leaves NAME.txt (its output) and NAME.json (its result, with
`failed` where something is wrong) in the folder; its line on the screen repeats why.  A stage that
is out of time is interrupted first, so that pytest names what failed.  summary.json is written anew
after each stage:

    machine    card, driver, versions
    compile    in parallel most kernels that the other stages launch; they compile the others
    backend    that CUDA tensors get the backend `triton`; if not, nothing else runs
    tests      the GPU tests that matter most, and how much of the accuracy rule's bound each case
               uses; margins.jsonl holds error and bound.  After an error of CUDA or HIP, which
               hides its cause, once more with launches that block, up to the first failure
    profile    three shapes: `triton` beside VMamba's pipeline and the floor of the card
    codec      encode and decode 768x512 with `base`: seconds by stage
    exchange   files written on the GPU and read on the CPU, and the reverse
    step       training of `tiny` by tools/bench_training.py: images per second, shares of the time
    rest       the other GPU tests, as far as the time goes

`--rehearse` runs all of it on a CPU, with triton's interpreter and the sizes cut.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_training
import compile_kernels
import numpy as np
import profile_scan
import torch
from bench_cpu import demo_image
from bench_training import WITH_GRAPH
from compile_kernels import Scan, Target, Variant, sequence
from determinism import decode_batch, scale_indexes
from profile_scan import BOTH, FORWARD, Settings, Shape
from provenance import ROOT, of_run, versions
from stage_clock import time_by_stage

import cmamba_ref
from cmamba_ref import CMamba
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CONFIGS
from cmamba_ref.ops import available_backends, dispatch

Result = dict[str, Any]

TEST_FILES = (
    "tests/test_gpu_scans.py",
    "tests/test_step_graph.py",
    "tests/test_determinism.py",
    "tests/test_profile_scan.py",
)
# Accuracy on every kind of kernel, memory, graphs and streams: two minutes at most.
FIRST_TESTS = (
    "(maps_are_as and (N2-R4 or N16-R12 or N3-R5-float32 or N32-R64-float32)) or "
    "(sequences_are_as and (varying-float32 or grouped-float32 or both-constant-float32)) or "
    "(scans_of_the_model and tiny) or 98304 or one_chunk or softplus_and_sigmoid or "
    "(carry_takes and sequence) or (maps_keep and N16-R12-float32) or where_gradients_lie or "
    "autocast or ten_runs or forward-and-backward or current_stream or "
    "peak_memory or auto_takes_triton or trains_with_a_graph"
)
CROP, BATCHES = 256, (16, 64)
GRACE_S = 20.0  # for a stage that was interrupted to say what it knows; pytest-xdist takes 10 s
INTERRUPTED = 2  # the exit status of pytest then
MAX_JOBS = 16  # processes that compile; each imports torch


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if args.rehearse else "cuda")


# ---------------------------------------------------------------- stages


def machine(args: argparse.Namespace) -> Result:
    """Card, driver and versions."""
    found: Result = {
        **of_run("gpu_check.py", sys.argv[1:]),
        "versions": versions("torch", "triton", "numpy", "pytest"),
        "cuda": torch.version.cuda,
    }
    if not args.rehearse:
        query = "name,memory.total,clocks.sm,clocks.max.sm,driver_version"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        with contextlib.suppress(OSError):
            found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True).stdout
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = [properties.major, properties.minor]
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
    return found


def scans_to_compile() -> list[Scan]:
    """Return most scans that the stages launch: profile, models, the tests that come first."""
    scans: list[Scan] = []
    for case in profile_scan.PRESETS["short"]:
        s = case.shape
        scans.append(Scan(s))
        scans.append(Scan(sequence(4 * s.channels, s.states, s.height * s.width), groups=4))
    for side, images in ((CROP, BATCHES[0]), (512, 1)):
        for case in profile_scan.model_cases(side, side):
            model, _, place = case.label.partition(" ")
            if model not in ("tiny", "base"):
                continue
            if place == "context":  # trained in fp32, and run in fp64 when it codes
                scans += [Scan(case.shape, dtype) for dtype in ("fp32", "fp64")]
            else:
                shape = replace(case.shape, batch=images)
                scans += [Scan(shape, dtype) for dtype in ("fp32", "bf16")]
    square = functools.partial(Shape, 1, 128, 128)
    return [
        *scans,
        *(Scan(square(32, 2, 4), dtype) for dtype in ("fp32", "bf16")),
        *(Scan(square(192, 16, 12), dtype) for dtype in ("fp32", "bf16", "fp64")),
        *(Scan(square(40, 3, 5)), Scan(square(50, 32, 64)), Scan(Shape(1, 256, 384, 128, 16, 12))),
        *(Scan(sequence(6, 4), dtype, gate=True) for dtype in ("fp32", "bf16")),
        Scan(sequence(33, 16), gate=True, softplus=False, b_constant=True, c_constant=True),
    ]


def _compile(variant: Variant, target: Target) -> tuple[float, str]:
    """Return the seconds that a variant took to compile, and what went wrong."""
    start = time.perf_counter()
    try:
        compile_kernels.compiled(variant, target)
    except Exception as error:  # noqa: BLE001 - the compiler's, of any type
        return time.perf_counter() - start, f"{variant}: {error!r:.500}"
    return time.perf_counter() - start, ""


def compile_all(args: argparse.Namespace) -> Result:
    """Compile in parallel, ahead of the launches, into the cache that they look into."""
    found = compile_kernels.variants(scans_to_compile())
    found.sort(key=lambda variant: variant.kernel != "chunk_scan_bwd")  # the slowest first
    if args.rehearse:
        found = [variant for variant in found if variant.kernel == "state_passing"][:2]
    target = compile_kernels.TARGETS["sm_90"] if args.rehearse else own_target()
    jobs = min(len(found), len(os.sched_getaffinity(0)), MAX_JOBS)
    start = time.perf_counter()
    done, failures = [], []
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, variant, target): variant for variant in found}
        for future in concurrent.futures.as_completed(futures):
            try:
                done.append(future.result())
            except concurrent.futures.BrokenExecutor:  # the compiler ended its process
                failures.append(f"not compiled, one of these ended the compiler: {futures[future]}")
    failures += [failure for _, failure in done if failure]
    result = {
        "kernels": len(done),
        "processes": jobs,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": sum(seconds for seconds, _ in done),
        "failures": failures,
    }
    if failures:
        result["failed"] = f"{len(failures)} kernels do not compile"
    return result


def own_target() -> Target:
    """Return the target that triton compiles for on this machine."""
    from triton.runtime import driver

    target: Any = driver.active.get_current_target()
    return target.backend, target.arch, target.warp_size


def backend(args: argparse.Namespace) -> Result:
    """Refuse to measure another backend than the kernels."""
    chosen = dispatch.choose("triton" if args.rehearse else "auto", device_of(args).type)
    result: Result = {"auto": chosen, "available": available_backends()}
    if chosen != "triton":
        result["failed"] = dispatch.BACKENDS["triton"].refusal("cuda", 1, 0)
    return result


def pytest_command(files: Sequence[str], chosen: str, processes: int) -> list[str]:
    """Run the GPU tests that an expression chooses.

    Plugins and warnings of a foreign environment fail no test, and the checkout stays as it is.
    """
    return [
        *(sys.executable, "-m", "pytest", *files, "-m", "gpu", "-k", chosen, "-v", "-rfEs"),
        *("-W", "default", "-p", "no:cacheprovider", "--durations=8"),
        *(("-n", str(processes), "--dist", "worksteal") if processes > 1 else ()),
    ]


def run_tests(args: argparse.Namespace, chosen: str, processes: int = 6) -> Result:
    """Run tests by pytest; margins of the accuracy rule go to margins.jsonl as they come."""
    margins = args.out / "margins.jsonl"
    has_xdist = not args.rehearse and importlib.util.find_spec("xdist") is not None
    command = pytest_command(TEST_FILES, chosen, processes if has_xdist else 1)
    margins.touch()
    before = len(margins.read_text().splitlines())
    status = _run_pytest(command, {**os.environ, "CMAMBA_MARGINS": str(margins)})
    output = (args.out / f"{args.stage}.txt").read_text(errors="replace")
    shares = shares_of_bound(margins.read_text().splitlines()[before:])
    # Reported later than caused, and by every test after.
    if status != INTERRUPTED and re.search(r"(CUDA|HIP) error|Triton Error \[", output):
        print("once more, each launch by itself, up to the first failure", flush=True)
        blocking = {"CUDA_LAUNCH_BLOCKING": "1", "AMD_SERIALIZE_KERNEL": "3"}
        _run_pytest([*pytest_command(TEST_FILES, chosen, 1), "-x"], {**os.environ, **blocking})
    for one in shares:
        print(f"{one['share']:.3f} of the bound: {one['name']}, {one['test']}")
    result: Result = {
        "exit_status": status,
        "summary": output.strip().splitlines()[-1:],
        "cases": len(shares),
        "largest_share_of_bound": shares[:10],
    }
    if status:
        result["tests_failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        count = len(result["tests_failed"])
        result["failed"] = f"{count} tests failed" if count else f"pytest ended with {status}"
    return result


def _run_pytest(command: Sequence[str], environment: dict[str, str]) -> int:
    """Return the exit status of pytest, whose output goes into the file of this stage."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest inherits
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    # When the time is over, pytest is interrupted and reports; its result is still written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return process.wait()


def shares_of_bound(lines: list[str]) -> list[Result]:
    """Return every comparison with its error as a share of what is allowed, largest first."""
    # A process that ended while it wrote leaves part of a line.
    found = [json.loads(line) for line in lines if line.endswith("}")]
    for one in found:
        one["share"] = one["error"] / one["bound"] if one["bound"] else float(one["error"] > 0)
    return sorted(found, key=lambda one: -one["share"])


def tests(args: argparse.Namespace) -> Result:
    """The tests that matter most."""
    return run_tests(args, FIRST_TESTS)


def rest(args: argparse.Namespace) -> Result:
    """The other ones, one after the other: some need most of the memory of the GPU."""
    return run_tests(args, f"not ({FIRST_TESTS})", processes=1)


def profile(args: argparse.Namespace) -> Result:
    """Measure the scan beside VMamba's pipeline; the table is in profile.txt."""
    device, modes = device_of(args), (FORWARD, BOTH)
    settings = Settings(device, "fp32", modes, repeats=20, seconds=0.2)
    cases = profile_scan.PRESETS["short"]
    if args.rehearse:  # the interpreter takes a minute for what a GPU does at once
        settings = replace(settings, repeats=3, checked_map=(1, 3, 3))
        cases = profile_scan.fixed_cases("rehearsal", (1, 4, 4, 4, 2, 1))
    names = ("triton", "vmamba-pipeline")
    candidates = [profile_scan.find_candidate(name, settings) for name in names]
    gpu = profile_scan.gpu_model(device)
    print(profile_scan.HEADING)
    rows = list(profile_scan.profile_cases(cases, candidates, settings, gpu))
    result: Result = {"notes": profile_scan.NOTES, "results": rows}
    if any(row["status"] == "failed" for row in rows):
        result["failed"] = "a backend is wrong; see the output"
    return result


def codec(args: argparse.Namespace) -> Result:
    """Where the time of encoding and decoding goes; weights are random, so rates mean nothing."""
    height, width = (64, 64) if args.rehearse else (512, 768)
    torch.manual_seed(0)
    config = CONFIGS["tiny" if args.rehearse else "base"]
    model = CMamba(config).eval()
    model.update()
    model.to(device_of(args))
    pixels = demo_image(width, height)
    result: Result = {"config": config.name, "height": height, "width": width}
    file = cmamba_ref.encode(pixels, model)
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: cmamba_ref.encode(pixels, model),
        "decode": lambda: cmamba_ref.decode(file, model),
    }
    for name, call in calls.items():
        seconds = []
        for _ in range(4):  # each ends with bytes or pixels on the CPU
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        _, timing = time_by_stage(model, call)  # waits for the GPU at each stage
        result[name] = {
            "median_seconds": float(np.median(seconds[1:])),
            "seconds_by_stage": timing.stages,
            "entropy_coder_share": timing.stages.get("entropy coder", 0.0) / timing.total,
        }
    return result


def exchange(args: argparse.Namespace) -> Result:
    """Write on one device and read on the other: the same symbols, pixels within 1."""
    here = CMamba.from_pretrained("tiny")
    there = copy.deepcopy(here).to(device_of(args))
    pixels = demo_image(*((80, 64) if args.rehearse else (600, 400)))
    found: Result = {}
    for name, writer, reader in (("gpu to cpu", there, here), ("cpu to gpu", here, there)):
        for quality in (1, 4, 8):
            file = cmamba_ref.encode(pixels, writer, quality)
            # Other symbols would fail their check in either.
            parameters = [decode_batch(m, [file])[0][:, 0] for m in (writer, reader)]
            indexes = [scale_indexes(file, of_device) for of_device in parameters]
            decoded = [cmamba_ref.decode(file, m).astype(int) for m in (writer, reader)]
            found[f"{name}, quality {quality}"] = {
                "bytes": len(file),
                "symbols": indexes[0].size,
                "mismatched_symbols": int((indexes[0] != indexes[1]).sum()),
                "largest_pixel_difference": int(np.abs(decoded[0] - decoded[1]).max()),
            }
    if any(r["mismatched_symbols"] or r["largest_pixel_difference"] > 1 for r in found.values()):
        return {"failed": "the devices disagree", **found}
    return found


def step(args: argparse.Namespace) -> Result:
    """Train on batches of several sizes, and say where the time of a step goes."""
    sizes = ["64x2"] if args.rehearse else [f"{CROP}x{batch}" for batch in BATCHES]
    rows = args.out / "training_rows.json"
    rows.unlink(missing_ok=True)  # of an earlier run
    status = bench_training.main(
        [
            *("--device", device_of(args).type, "--json", str(rows), "--sizes", *sizes),
            *("--backends", *(["chunked"] if args.rehearse else ["triton"])),
            *("--precision", "fp32" if args.rehearse else "bf16", "--cuda-graph"),
        ]
    )
    result: Result = {"steps": json.loads(rows.read_text())["rows"] if rows.exists() else []}
    if status:
        result["failed"] = "training failed"
    elif not args.rehearse and any(row[WITH_GRAPH] is None for row in result["steps"]):
        result["failed"] = "no CUDA graph was recorded"
    return result


# Each with the share of the time that it may take at most.
STAGES: dict[str, tuple[Callable[[argparse.Namespace], Result], float]] = {
    "machine": (machine, 0.1),
    "compile": (compile_all, 0.3),
    "backend": (backend, 0.1),
    "tests": (tests, 0.35),
    "profile": (profile, 0.25),
    "codec": (codec, 0.2),
    "exchange": (exchange, 0.15),
    "step": (step, 0.3),
    "rest": (rest, 1.0),
}


# ---------------------------------------------------------------- one after the other


def run_stage(args: argparse.Namespace) -> int:
    """Run one stage in this process, and leave its result."""
    call, _ = STAGES[args.stage]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        result = call(args)
    except Exception as error:  # noqa: BLE001 - whatever a GPU does, the reason is kept
        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    write_json(args.out / f"{args.stage}.json", result)
    return int("failed" in result)


def run_all(args: argparse.Namespace) -> int:
    """Run the stages one after the other, each within its time; 0 if all of them passed."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.stages:  # of an earlier run
        for kind in ("json", "txt"):
            (args.out / f"{name}.{kind}").unlink(missing_ok=True)
    (args.out / "margins.jsonl").unlink(missing_ok=True)
    began, summary = time.monotonic(), {}
    for name in args.stages:
        left = 60 * args.minutes - (time.monotonic() - began) - GRACE_S
        limit = min(left, 60 * args.minutes * STAGES[name][1])
        start = time.monotonic()
        summary[name] = {"status": run_one(args, name, limit) if limit > 5 else "no time left"}
        summary[name]["seconds"] = round(time.monotonic() - start, 1)
        write_json(args.out / "summary.json", summary)
        status, reason = summary[name]["status"], ""
        if status in ("failed", "out of time"):
            reason = reason_of(args.out, name)
        print(f"{name:<10}{status:<14}{summary[name]['seconds']:>7} s  {reason}", flush=True)
        if name == "backend" and summary[name]["status"] != "ok":
            print("nothing else is run", file=sys.stderr)
            break
    return 0 if all(stage["status"] == "ok" for stage in summary.values()) else 1


def reason_of(out: Path, name: str) -> str:
    """Return in one line why a stage failed, as far as it said so, and where its output is."""
    result = out / f"{name}.json"
    failed = json.loads(result.read_text()).get("failed", "") if result.exists() else ""
    return "; ".join([*failed.splitlines()[:1], f"see {out / name}.txt"])


def run_one(args: argparse.Namespace, name: str, seconds: float) -> str:
    """Run a stage in a process of its own; return how it ended."""
    command = [sys.executable, __file__, "--out", str(args.out), "--stage", name]
    command += ["--rehearse"] if args.rehearse else []
    with open(args.out / f"{name}.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_of(args, name),
            start_new_session=True,
        )
        try:
            return "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # and what it started
            process.wait()


def environment_of(args: argparse.Namespace, stage: str) -> dict[str, str]:
    """The checkout first on the path, and the interpreter only where there is no GPU."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    for name in ("TRITON_INTERPRET", dispatch.ENVIRONMENT_VARIABLE):
        environment.pop(name, None)
    if args.rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if args.rehearse and stage != "compile":
        environment["TRITON_INTERPRET"] = "1"
    return environment


def write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the results")
    add("--minutes", type=profile_scan.positive, default=10.0, help="in all (default: 10)")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    add("--rehearse", action="store_true", help="on a CPU, with the sizes cut")
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if args.stage:
        return run_stage(args)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --rehearse runs the check on a CPU")
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
