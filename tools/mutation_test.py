"""Puts small defects into the entropy coder and the container, and counts which ones tests notice.

    python tools/mutation_test.py --sample 400 --seed 1 -o benchmarks/mutation.json

A mutant is one module with one change: a comparison, an operator, a number by one, a truth value, a
slice by one, a statement left out.  Text of messages and annotations is left alone.  Each mutant is
compiled in memory, nothing on disk changes, and meets the quick ones of its module's tests, in a
forked process that has torch already.  The first failure kills it; so does a process that takes
five times the processor time of the sound module.

A survivor is either a gap in the tests or no defect.  `benchmarks/mutation_survivors.json` says of
each why it is none; the exit status is 1 if it does not, or if fewer than 85 % were killed, 2 for
wrong arguments, 130 after Ctrl-C.

What was done lies beside the output until the run is complete, and a run that was cut short goes on
from there.  An output that is there is added to: a larger sample begins with the smaller one of the
same seed.  Linux only, for the limits.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import provenance
from partial_results import OtherConditionsError, PartialResults

from cmamba_ref.atomic_write import write_atomically

ROOT = Path(__file__).resolve().parents[1]
EXPLANATIONS = ROOT / "benchmarks" / "mutation_survivors.json"
LEAST_KILLED = 0.85

# Modules, and the test files that try them, the ones that notice most first.
MODULES = {
    "bitstream": ["bitstream", "golden", "hostile_files", "codec"],
    "codec": ["golden", "hostile_files", "codec", "memory"],
    "entropy.bounds": ["model"],
    "entropy.factorized": ["factorized", "model", "golden"],
    "entropy.gaussian": ["determinism", "model", "golden"],
    "entropy.precision": ["model", "factorized", "determinism", "codec"],
    "entropy.rans": ["rans", "golden", "hostile_files"],
    "entropy.stored_tables": ["golden", "hostile_files", "codec"],
    "entropy.tables": ["tables", "rans", "golden", "hostile_files"],
}
# Too slow for hundreds of runs, or a measurement of time, which other work on the machine changes.
LEFT_OUT = [
    "rans.py::test_speed",
    "rans.py::test_length_of_other_distributions",
    "rans.py::test_flipped_bits_end_in_an_error_or_in_symbols",
    "hostile_files.py::test_five_hundred_mutated_files_are_errors_or_pictures",
    "hostile_files.py::test_mutations_reach_every_check",
    "hostile_files.py::test_a_file_truncated_anywhere_is_refused_with_its_checksum_made_right",
    "hostile_files.py::test_the_weights_that_ship_refuse_a_file_of_another_model",
    "codec.py::test_kodak_through_files",
    "codec.py::test_one_photograph_at_every_quality",
    "codec.py::test_odd_sizes_through_files",
    "codec.py::test_a_nan_in_any_weight_makes_an_error_or_no_difference",
    "codec.py::test_every_weight_and_table_is_in_the_id",
    "codec.py::test_the_shortest_streams_pass_the_check_of_lengths",
    "determinism.py::test_kodak_decodes_the_same_in_another_process",
    "determinism.py::test_odd_sizes_decode_the_same_in_another_process",
    "determinism.py::test_every_scale_of_a_photograph_keeps_the_margin",
    "memory.py::test_a_picture_takes_about_what_is_predicted",
    "model.py::test_base_lands_on_the_published_totals",
    "model.py::test_totals_of_the_other_configurations",
    "model.py::test_complexity_table_names_every_convention",
    "model.py::test_a_fresh_model_already_reconstructs",
    "model.py::test_scan_elements_are_counted_by_hand",
    "model.py::test_ssm_sees_the_whole_map",
]
# Imported before the first fork. Nothing that imports a module under test.
PRELOADED = (
    "torch", "numpy", "pytest", "_pytest.assertion.rewrite", "hypothesis", "constriction",
    "safetensors.torch", "PIL.Image", "einops",
)  # fmt: skip

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip


class UnsoundError(Exception):
    """Outcomes would say nothing about the tests."""


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Attributes:
        module: dotted, inside the package.
        number: of the change, in the order in which `changes` finds them.
        line: in the sound source.
        function: that holds it, dotted; empty at the top of the module.
        before, after: the statement, or its first line where it is compound.
    """

    module: str
    number: int
    line: int
    function: str
    before: str
    after: str

    @property
    def key(self) -> str:
        return f"{self.module} {self.number}"

    @property
    def what(self) -> list[str]:
        """Names the defect as long as its statement stays as it is, on whatever line."""
        return [self.module, self.function, self.before, self.after]


def source_of(module: str) -> Path:
    return ROOT / "cmamba_ref" / (module.replace(".", "/") + ".py")


Change = Callable[[], Callable[[], None]]
"""Puts a defect into the tree when called, and returns what takes it out again."""


def changes(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, Change]]:
    """Every defect: the statement it is in, the function around that, and the change itself."""

    def of_body(body: list[ast.stmt], scope: str) -> Iterator[tuple[ast.stmt, str, Change]]:
        for place, statement in enumerate(body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                continue
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            inner = scope
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                inner = f"{scope}.{statement.name}".lstrip(".")
            if isinstance(statement, ast.Raise | ast.Expr | ast.AugAssign):
                yield statement, scope, _replacement(body, place, ast.Pass())
            for change in _in_expressions(statement):
                yield statement, inner, change
            for name in ("body", "orelse", "finalbody"):
                yield from of_body(getattr(statement, name, []), inner)
            for handler in getattr(statement, "handlers", []):
                yield from of_body(handler.body, inner)

    yield from of_body(tree.body, "")


def _replacement(holder: Any, place: str | int, new: Any) -> Change:
    """The change of one field of a node, or of one element of a list."""

    def apply() -> Callable[[], None]:
        old = holder[place] if isinstance(place, int) else getattr(holder, place)

        def put(value: Any) -> None:
            if isinstance(place, int):
                holder[place] = value
            else:
                setattr(holder, place, value)

        put(ast.copy_location(new, old) if isinstance(old, ast.stmt | ast.expr) else new)
        return lambda: put(old)

    return apply


def _in_expressions(statement: ast.stmt) -> Iterator[Change]:
    """The defects in a statement's own expressions, not in the statements inside it."""
    if isinstance(statement, ast.AugAssign):
        yield _replacement(statement, "op", OPERATORS[type(statement.op)]())
    waiting: list[tuple[ast.AST, str | int, ast.AST]] = []

    def add_children(node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            holder = value if isinstance(value, list) else node
            items = enumerate(value) if isinstance(value, list) else [(name, value)]
            for place, item in items:
                if isinstance(item, ast.AST) and not isinstance(item, ast.stmt | ast.JoinedStr):
                    waiting.append((holder, place, item))  # type: ignore[arg-type]

    add_children(statement)
    while waiting:
        holder, place, node = waiting.pop(0)
        if isinstance(node, ast.ExceptHandler):
            continue
        for new in _other_expressions(node):
            yield _replacement(holder, place, new)
        yield from _in_place(node)
        add_children(node)


def _other_expressions(node: ast.AST) -> Iterator[ast.expr]:
    """What stands in the place of an expression."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(node.value + 1)
            yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand


def _in_place(node: ast.AST) -> Iterator[Change]:
    """Changes of an expression's operator or bounds."""
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            yield _replacement(node.ops, place, COMPARISONS[type(op)]())
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _replacement(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _replacement(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.IfExp):
        yield _replacement(node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):
                yield _replacement(node, name, ast.BinOp(bound, ast.Add(), ast.Constant(1)))


def mutants_of(module: str) -> list[Mutant]:
    """All mutants of a module."""
    tree = ast.parse(source_of(module).read_text())
    found = []
    for number, (statement, function, change) in enumerate(changes(tree)):
        before = _first_line(statement)
        undo = change()
        after = _first_line(statement) if _differs(statement, before) else "pass"
        undo()
        found.append(Mutant(module, number, statement.lineno, function, before, after))
    return found


def _first_line(statement: ast.stmt) -> str:
    """The statement on one line; of a compound one, what precedes its body."""
    if hasattr(statement, "body"):
        statement = ast.fix_missing_locations(_without_body(statement))
    return " ".join(ast.unparse(statement).split())


def _without_body(statement: ast.stmt) -> ast.stmt:
    fields = {name: value for name, value in ast.iter_fields(statement) if name != "body"}
    for name in ("orelse", "finalbody", "handlers"):
        if name in fields:
            fields[name] = []
    if isinstance(statement, ast.Try):
        return ast.Try([ast.Pass()], [], [], [ast.Pass()])
    fields["body"] = [ast.Expr(ast.Constant(...))]
    return type(statement)(**fields)


def _differs(statement: ast.stmt, before: str) -> bool:
    return _first_line(statement) != before


def mutated(mutant: Mutant) -> ast.Module:
    """The tree of the module with the defect."""
    tree = ast.parse(source_of(mutant.module).read_text())
    for number, (_, _, change) in enumerate(changes(tree)):
        if number == mutant.number:
            change()
            return ast.fix_missing_locations(tree)
    raise ValueError(f"there is no mutant {mutant.key}")


# Running.


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module from a tree in place of its file."""

    tree: ast.Module

    def get_code(self, fullname: str):
        return compile(self.tree, self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.name = f"cmamba_ref.{mutant.module}"
        self.path = source_of(mutant.module)
        self.tree = mutated(mutant)

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        loader = _Loader(fullname, str(self.path))
        loader.tree = self.tree
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


class _FirstFailure:
    """A plugin for pytest that remembers what failed first."""

    name = ""

    def pytest_sessionstart(self) -> None:
        """Of a failure, Hypothesis need not find the simplest example."""
        phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.shrink]
        hypothesis.settings.register_profile("unshrunk", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("unshrunk")

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.removeprefix("tests/")

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid.removeprefix('tests/')}"


def test_arguments(module: str) -> list[str]:
    """For pytest: the quick tests of a module."""
    return [
        "-x", "-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT),
        "-W", "ignore::pytest.PytestAssertRewriteWarning",  # hypothesis is imported already
        *(f"--deselect=tests/test_{name}" for name in LEFT_OUT),
        *(str(ROOT / "tests" / f"test_{name}.py") for name in MODULES[module]),
    ]  # fmt: skip


def _test_in_child(module: str, mutant: Mutant | None, pipe: int, cpu_seconds: float) -> None:
    """In the forked process: the tests, with the defect in place; writes what failed first."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    limit = int(cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    import pytest

    first = _FirstFailure()
    code = pytest.main(test_arguments(module), plugins=[first])
    killed = first.name or ("" if code == 0 else f"pytest ended with {code!s}")
    os.write(pipe, killed.encode()[:500])


def run_tests(module: str, mutant: Mutant | None, cpu_seconds: float) -> dict[str, Any]:
    """Outcome, the test that decided it, and the processor time.

    Raises:
        UnsoundError: this process has the module already, and tests in a fork would meet that one.
    """
    if f"cmamba_ref.{module}" in sys.modules:
        raise UnsoundError(f"cmamba_ref.{module} is imported before its mutants")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that its own children can be ended with it
        try:
            _test_in_child(module, mutant, writing, cpu_seconds)
        except BaseException:  # noqa: BLE001  # this process must not go on as its parent
            os.write(writing, traceback.format_exc()[-500:].encode())
        os._exit(0)
    os.close(writing)
    try:
        # By the clock ten times as long: the machine may have other work.
        ready, _, _ = select.select([reading], [], [], 10 * cpu_seconds)
    except KeyboardInterrupt:
        os.killpg(child, signal.SIGKILL)
        raise
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that tests started and left
    with open(reading) as pipe:
        by = pipe.read()
    if not by and status != 0:
        by = f"end of the process, status {status}"
    seconds = round(usage.ru_utime + usage.ru_stime, 2)
    return {"outcome": "killed" if by else "survived", "by": by, "seconds": seconds}


# What came of it.


def _fingerprint(mutants: list[Mutant]) -> str:
    """Of all defects that can be made: results of others do not belong together with these."""
    return hashlib.sha256(json.dumps([m.what for m in mutants]).encode()).hexdigest()[:16]


def _earlier(output: Path | None, conditions: dict[str, object]) -> list[dict[str, Any]]:
    """The rows of an output that is there.

    Raises:
        OtherConditionsError: they are of other defects.
    """
    if output is None or not output.exists():
        return []
    earlier = json.loads(output.read_text())
    if earlier["conditions"] != conditions:
        raise OtherConditionsError(
            f"{output} is of other sources, modules or another seed; complete that one, or start "
            "again with --fresh"
        )
    return earlier["rows"]


def still_there(killer: str) -> bool:
    """Whether the test that killed a mutant has not been removed or renamed since."""
    file, _, test = killer.partition("::")
    path = ROOT / "tests" / file
    return not test or path.exists() and f"def {test.partition('[')[0]}(" in path.read_text()


def _explanations() -> dict[str, str]:
    """Why a survivor is no defect, by what it is."""
    if not EXPLANATIONS.exists():
        return {}
    return {json.dumps(e["what"]): e["why"] for e in json.loads(EXPLANATIONS.read_text())}


def summary(rows: list[dict[str, Any]], total: Counter[str]) -> dict[str, Any]:
    """Counts, and the survivors with what is known of them."""
    why = _explanations()
    by_module = {}
    for module in total:
        of_module = [row for row in rows if row["what"][0] == module]
        killed = sum(row["outcome"] == "killed" for row in of_module)
        by_module[module] = {"all": total[module], "run": len(of_module), "killed": killed}
    survivors = [
        {
            "line": row["line"],
            "what": row["what"],
            "why": why.get(json.dumps(row["what"]), ""),
        }
        for row in rows
        if row["outcome"] == "survived"
    ]
    killed = len(rows) - len(survivors)
    return {
        "mutants": sum(total.values()),
        "run": len(rows),
        "killed": killed,
        "killed_part": round(killed / len(rows), 4) if rows else 0.0,
        "by_module": by_module,
        "unexplained": sum(not s["why"] for s in survivors),
        "survivors": survivors,
    }


def run_mutants(mutants: list[Mutant], partial: PartialResults) -> None:
    """Run those that have no result yet, and keep each result.

    Raises:
        UnsoundError: a test fails without any defect, so that its failures say nothing.
    """
    limits: dict[str, float] = {}
    start = time.monotonic()
    for count, mutant in enumerate(mutants, 1):
        if mutant.key in partial.results:
            continue
        if mutant.module not in limits:
            sound = run_tests(mutant.module, None, cpu_seconds=600)
            if sound["outcome"] != "survived":
                raise UnsoundError(f"a test fails without any defect: {sound['by']}")
            limits[mutant.module] = 5 * sound["seconds"] + 10
        outcome = run_tests(mutant.module, mutant, limits[mutant.module])
        row = {"key": mutant.key, "line": mutant.line, "what": mutant.what, **outcome}
        partial.add(mutant.key, row)
        print(
            f"{count}/{len(mutants)} {time.monotonic() - start:.0f} s  {outcome['outcome']}  "
            f"{mutant.module}:{mutant.line}  {mutant.before[:60]}  ->  {mutant.after[:60]}  "
            f"{outcome['by'][:60]}",
            file=sys.stderr,
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--modules", nargs="+", choices=MODULES, default=list(MODULES),
        help="which to put defects into; default: all",
    )  # fmt: skip
    add("--sample", type=int, help="how many mutants, in an order drawn by --seed; default: all")
    add("--seed", type=int, default=0, help="of their order; default: %(default)s")
    add("-o", "--output", type=Path, help="JSON to write")
    add("--fresh", action="store_true", help="forget what earlier runs have kept")
    add(
        "--survivors", action="store_true",
        help="run earlier survivors again, with new tests, and those whose test has gone",
    )  # fmt: skip
    add("--only", metavar="KEY", help='run one mutant, such as "entropy.rans 17", and print it')
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(arguments)
    for name in PRELOADED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a process with other threads must not fork
    found = [mutant for module in args.modules for mutant in mutants_of(module)]
    if args.only:
        (mutant,) = [m for m in found if m.key == args.only]
        try:
            outcome = run_tests(mutant.module, mutant, cpu_seconds=300)
        except UnsoundError as error:
            parser.exit(1, f"{error}\n")
        print(json.dumps({"what": mutant.what, "line": mutant.line, **outcome}, indent=2))
        return 0
    conditions = {
        "mutants": _fingerprint(found),
        "modules": args.modules,
        "seed": args.seed,
    }
    # A larger sample begins with the smaller one.
    chosen = random.Random(args.seed).sample(found, len(found))[: args.sample]
    try:
        earlier = [] if args.fresh else _earlier(args.output, conditions)
        partial = PartialResults(args.output, conditions, fresh=args.fresh)
    except OtherConditionsError as error:
        parser.error(str(error))
    if args.survivors:
        earlier = [r for r in earlier if r["outcome"] == "killed" and still_there(r["by"])]
    kept = {row["key"]: row for row in earlier}
    try:
        run_mutants([m for m in chosen if m.key not in kept], partial)
    except KeyboardInterrupt:
        print(f"interrupted; {len(partial.results)} mutants are kept", file=sys.stderr)
        return 130
    except UnsoundError as error:
        parser.exit(1, f"{error}\n")
    done = kept | partial.results
    rows = [done[mutant.key] for mutant in chosen]
    result = summary(rows, Counter(mutant.module for mutant in found))
    if args.output is not None:
        meta = provenance.of_run("mutation_test.py", arguments)
        meta["versions"] = provenance.versions("torch", "numpy", "pytest", "hypothesis")
        meta["tests_left_out"] = LEFT_OUT
        whole = {"meta": meta, "conditions": conditions, **result, "rows": rows}
        write_atomically(args.output, (_lines(whole) + "\n").encode())
        partial.discard()
    for survivor in result["survivors"]:
        print(f"survived: {survivor['line']} {survivor['what']}: {survivor['why'] or '?'}")
    print(f"{result['killed']} of {result['run']} killed, {result['killed_part']:.1%}")
    return 1 if result["unexplained"] or result["killed_part"] < LEAST_KILLED else 0


def _lines(whole: dict[str, Any]) -> str:
    """JSON with one line for each entry of a list."""
    parts = []
    for name, value in whole.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f'"{name}": [\n{rows}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
