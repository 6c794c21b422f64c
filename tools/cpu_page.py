"""The page of `bench_cpu.py`: its JSON as Markdown, with the goals held against the figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markdown_table import markdown_table
from profile_scan import BOTH, FORWARD, as_text

Section = dict[str, Any]

# ns per position, channel, state and direction on two cores: a loop in C++ written by hand for
# vector units, which keeps the states in registers.  Measured once on the machine this project was
# begun on, with the shape of the section `scan`; it is no part of the project.
LIMIT_NS = 0.08

MODE_NAMES = {FORWARD: "forward", BOTH: "forward and backward"}

WHY_ABOVE_THE_LIMIT = (
    f"The limit, {LIMIT_NS} ns, is what a C++ loop written by hand for vector units took for the "
    "forward of a scan of 24,576 positions, 192 channels, 16 states and four directions on two "
    "cores, when this project began; it was not measured in this run. That loop reads each input "
    "once, forms the decay, keeps the states in registers and adds up the output: one pass, and no "
    "memory between the steps. PyTorch without a compiler has no such pass. Decay, input, "
    "recurrence and the sum over states are calls of their own, each of which reads and writes the "
    "states of a block through the cache, and the recurrence is a call per step, which has its "
    "price whatever it computes. Blocks keep that traffic in the cache and chunks give each call "
    "enough to do; what is left of the gap is the price of needing no compiler."
)


@dataclass(frozen=True)
class Goal:
    """What a figure should be.

    Attributes:
        value: None where it was not measured.
        at_most: whether the bound is an upper one.
    """

    name: str
    value: float | None
    bound: float
    unit: str
    at_most: bool

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        held = self.value <= self.bound if self.at_most else self.value >= self.bound
        return "held" if held else "missed"

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}{self.unit}"

    @property
    def found(self) -> str:
        return "-" if self.value is None else f"{as_text(float(self.value))}{self.unit}"

    def line(self) -> str:
        return f"{self.verdict:<13} {self.name}: {self.found}, wanted {self.wanted}"


# ---------------------------------------------------------------- goals


def goals(sections: Section) -> list[Goal]:
    """All goals, with what was measured for each."""
    scan, growth = sections.get("scan", {}), sections.get("growth", {})
    found = []
    for mode, peer, bound in (
        (FORWARD, "ref-style", 20),
        (FORWARD, "mambapy", 8),
        (BOTH, "ref-style", 10),
        (BOTH, "mambapy", 4),
    ):
        name = f"scan, {MODE_NAMES[mode]}: faster than {peer}"
        found.append(Goal(name, speedup(scan, mode, peer, "chunked"), bound, " times", False))
    for mode in (FORWARD, BOTH):
        name = f"scan, {MODE_NAMES[mode]}: memory beyond the inputs"
        found.append(Goal(name, extra_of_inputs(scan, mode), 3, " times the inputs", True))
    for varied in ("positions", "states"):
        for mode in (FORWARD, BOTH):
            value = growth.get("exponents", {}).get(f"{varied}, {mode}")
            name = f"growth with {varied}, {MODE_NAMES[mode]}: exponent"
            found.append(Goal(name, value, 1.05, "", True))
    kodak = {"model": "small", "width": 768, "height": 512}
    for direction in ("encode", "decode"):
        run = find_run(sections.get("codec", {}), direction=direction, **kodak)
        name = f"codec, small, 768x512: {direction}"
        found.append(Goal(name, run.get("median_s"), 6, " s", True))
    for direction in ("encode", "decode"):
        value = sections.get("startup", {}).get(direction, {}).get("wall_s")
        found.append(Goal(f"`cmamba {direction}`, whole process", value, 2, " s", True))
    for direction in ("encode", "decode"):
        run = find_run(sections.get("large", {}), direction=direction)
        size = f"{run.get('width', 6000)}x{run.get('height', 4000)}"
        peak = run.get("peak_mib")
        name = f"large, small, {size}: {direction}"
        found.append(Goal(name, run.get("first_s"), 600, " s", True))
        gib = None if peak is None else peak / 1024
        found.append(Goal(f"{name}, peak memory", gib, 8, " GiB", True))
    return found


def scan_row(scan: Section, mode: str, backend: str) -> Section:
    """The figures of a backend, or nothing."""
    for row in scan.get("rows", ()):
        if (row["mode"], row["backend"], row["status"]) == (mode, backend, "ok"):
            return row
    return {}


def speedup(scan: Section, mode: str, slow: str, fast: str) -> float | None:
    """How many times longer one takes than the other."""
    slow_row, fast_row = (scan_row(scan, mode, name) for name in (slow, fast))
    if not slow_row or not fast_row:
        return None
    return slow_row["median_ms"] / fast_row["median_ms"]


def extra_of_inputs(scan: Section, mode: str, backend: str = "chunked") -> float | None:
    """Peak memory beyond that before the call, over the size of all arguments."""
    peak = scan_row(scan, mode, backend).get("peak_mib")
    return None if peak is None else peak / scan["inputs_mib"]


def find_run(section: Section, **wanted: object) -> Section:
    """The run of the codec with these properties, or nothing."""
    for run in section.get("runs", ()):
        if run["status"] == "ok" and all(run[key] == value for key, value in wanted.items()):
            return run
    return {}


# ---------------------------------------------------------------- Markdown


def to_markdown(sections: Section) -> str:
    """The page."""
    parts = [
        "# Time and memory on a CPU",
        "Made by `python tools/bench_cpu.py --json benchmarks/cpu.json --markdown "
        "benchmarks/cpu.md` from that JSON. Do not edit: run the command again. Times are medians.",
        "## Goals",
        markdown_table(
            ("goal", "wanted", "measured", ""),
            ((goal.name, goal.wanted, goal.found, goal.verdict) for goal in goals(sections)),
            figures=0,
        ),
    ]
    writers = {
        "scan": scan_part,
        "growth": growth_part,
        "codec": codec_part,
        "startup": startup_part,
        "large": large_part,
    }
    for name, write in writers.items():
        if name in sections:
            parts += [*write(sections[name]), measured_by(sections[name]["meta"])]
    return "\n\n".join(parts) + "\n"


def measured_by(meta: Section) -> str:
    """Where the figures above it come from."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    quick = " **Tiny sizes: these figures mean nothing.**" if meta["quick"] else ""
    return (
        f"`{meta['command']}`, commit {meta['commit']}, {meta['date']}, {meta['machine']}, "
        f"threads: {meta['threads']}, {meta['system']}; {versions}.{quick}"
    )


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{as_text(float(value))}"


def mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def scan_part(section: Section) -> list[str]:
    rows = []
    for row in section["rows"]:
        start = (MODE_NAMES[row["mode"]], row["backend"])
        if row["status"] != "ok":
            why = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
            rows.append((*start, why, *[""] * 6))
            continue
        extra = extra_of_inputs(section, row["mode"], row["backend"])
        times = speedup(section, row["mode"], row["backend"], "chunked")
        rows.append(
            (
                *start,
                seconds(row["median_ms"] / 1e3),
                seconds(row["iqr_ms"] / 1e3),
                as_text(row["ns_per_elt"]),
                as_text(row["ns_per_elt"] / LIMIT_NS),
                as_text(times),
                mib(row["peak_mib"]),
                as_text(extra),
            )
        )
    left_out = [f"`{name}` is left out: {why}." for name, why in section["left_out"].items()]
    return [
        "## One scan",
        f"Four directions, shape {section['shape']} (batch, height, width, channels, states, rank "
        f"of dt): {section['positions']} positions, fp32. Peers scan four copies of the map, as "
        "VMamba does; `python tools/profile_scan.py --help` describes them. Nothing is timed "
        "before its output and gradients were found right. Extra memory is the peak of the "
        "process beyond what it held before the call, results included; the inputs take "
        f"{section['inputs_mib']:.0f} MiB.",
        markdown_table(
            (
                "mode",
                "scan",
                "s",
                "IQR, s",
                "ns/elt",
                "over the limit, times",
                "over chunked, times",
                "extra MiB",
                "extra / inputs",
            ),
            rows,
            figures=7,
        ),
        *left_out,
        WHY_ABOVE_THE_LIMIT,
    ]


def growth_part(section: Section) -> list[str]:
    rows = (
        (
            row["varied"],
            MODE_NAMES[row["mode"]],
            row["shape"],
            str(row["size"]),
            seconds(row["median_s"]),
            as_text(row["ns_per_elt"]),
            mib(row["extra_mib"]),
        )
        for row in section["rows"]
    )
    return [
        "## Growth with positions and states",
        f"Backend `{section['backend']}`, fp32. The exponent e of time = c size^e, by least "
        f"squares on logarithms: {exponents_text(section)}.",
        markdown_table(
            ("varied", "mode", "shape", "size", "s", "ns/elt", "extra MiB"), rows, figures=4
        ),
    ]


def exponents_text(section: Section) -> str:
    known = section["exponents"].items()
    return "; ".join(f"{name} {value:.3f}" for name, value in known if value is not None) or "-"


def codec_part(section: Section) -> list[str]:
    text = (
        "`tiny` has the weights that ship, `small` random ones. Every line is a process of its "
        'own. Peak is the most memory the process had in RAM, of which "loaded" was there before '
        "the picture was coded, with Python, torch and the weights. First is the first run of a "
        "process, which also sets up torch and the float64 copies of the entropy path; the others "
        'are medians of later runs. "Of it scans" is part of the stages. Random weights make '
        "larger files (bpp), and the coder's share larger with them."
    )
    return [
        "## The codec",
        text,
        runs_table(section["runs"]),
        f"Exponent of the time in coded pixels: {exponents_text(section)}.",
        *stage_tables(section["runs"]),
    ]


def large_part(section: Section) -> list[str]:
    limits = section["limits"]
    return [
        "## A large photograph",
        f"Coded once, in processes of at most {limits['gib']:g} GiB and {limits['seconds']:g} s.",
        runs_table(section["runs"]),
        *stage_tables(section["runs"]),
    ]


def runs_table(runs: list[Section]) -> str:
    """One line for each picture, encoded or decoded."""
    rows = []
    for run in runs:
        start = (run["model"], f"{run['width']}x{run['height']}", run["direction"])
        if run["status"] != "ok" and "median_s" not in run:
            rows.append((*start, run["status"], *[""] * 6))
            continue
        rows.append(
            (
                *start,
                seconds(run["median_s"]),
                seconds(run["first_s"]),
                as_text(1e6 * run["median_s"] / (run["width"] * run["height"])),
                percent(run["scans_s"] / run["median_s"]),
                f"{run['bpp']:.2f}",
                mib(run["loaded_mib"]),
                mib(run["peak_mib"]),
            )
        )
    heading = ("model", "picture", "", "s", "first, s", "µs per pixel", "of it scans", "bpp")
    return markdown_table((*heading, "loaded MiB", "peak MiB"), rows, figures=7)


def stage_tables(runs: list[Section]) -> Iterator[str]:
    """Per model and direction: seconds, share and memory of each stage, by picture."""
    kinds = dict.fromkeys((run["model"], run["direction"]) for run in runs)
    for model, direction in kinds:
        measured = [
            run
            for run in runs
            if (run["model"], run["direction"]) == (model, direction) and "stages" in run
        ]
        if not measured:
            continue
        heading = ["stage"]
        for run in measured:
            heading += [f"{run['width']}x{run['height']}, s", "share", "peak MiB"]
        stages = dict.fromkeys(stage for run in measured for stage in run["stages"])
        rows = []
        for stage in stages:
            row = [stage]
            for run in measured:
                figures = run["stages"].get(stage)
                if figures is None:
                    row += ["-"] * 3
                    continue
                row += [
                    seconds(figures["seconds"]),
                    percent(figures["share"]),
                    mib(figures["peak_mib"]),
                ]
            rows.append(row)
        yield (
            f"{model}, {direction}, by stage; peak is that of the process while the stage was at "
            "work, beyond what was loaded:"
        )
        yield markdown_table(heading, rows, figures=3 * len(measured))


def startup_part(section: Section) -> list[str]:
    directions = [name for name in ("encode", "decode") if name in section]
    rows = [(name, "whole process", seconds(section[name]["wall_s"])) for name in directions] + [
        (name, part, seconds(value))
        for name in directions
        for part, value in section[name]["split_s"].items()
    ]
    return [
        "## Whole commands",
        f"`cmamba encode` and `cmamba decode` of a picture of {section['width']}x"
        f"{section['height']} with the weights that ship, from the start of the process to its "
        "end, with all files in the system's cache. The parts are those of further runs "
        "(`tools/timed_cli.py`), each a median, so they add up only nearly.",
        markdown_table(("command", "part", "s"), rows, figures=1),
    ]
