"""Fuzz one of the targets in tools/fuzz_targets.py with atheris, which is libFuzzer for Python.

    python tools/fuzz.py container runs/fuzz/container -max_total_time=600 -seed=1
    python tools/fuzz.py container runs/fuzz/container-crash-0123...  # try one input again

Inputs that reach new code are kept in the corpus, which starts with valid ones. Every input has to
end in a sound result or in an error that docs/reliability.md names, within 20 seconds and 1 GiB of
memory. Anything else is a finding: it is saved beside the corpus as TARGET-crash-... or
TARGET-timeout-..., its traceback is printed, and the run ends with an exit status that is not 0.
All that follows the corpus goes to libFuzzer. Linux only, for the limit of memory.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import atheris  # pyright: ignore[reportMissingModuleSource]  # only in the extra `fuzz`
from atheris import import_hook  # pyright: ignore[reportMissingModuleSource]

with import_hook.instrument_imports(include=["cmamba_ref", "PIL"]):
    from fuzz_targets import TARGETS, change_all, limit_memory

import torch

TIMEOUT_S = 20  # of wall-clock time: other work on the machine counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,  # -h would take the options of libFuzzer that begin like it
    )
    parser.add_argument("--help", action="help", help="show this message and exit")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("corpus", type=Path, help="folder of inputs, made if need be; or one input")
    args, options = parser.parse_known_args()
    target = TARGETS[args.target]
    if not args.corpus.is_file():
        args.corpus.mkdir(parents=True, exist_ok=True)
        for i, seed in enumerate(target.seeds()):
            (args.corpus / f"seed-{i}").write_bytes(seed)

    def attempt(data: bytes) -> None:
        with contextlib.suppress(*target.errors):
            target.use(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Change every second input as a whole: wrong checksums and lengths are tried too."""

        def change(part: bytes) -> bytes:
            return atheris.Mutate(part, max_size)

        mutated = (target.mutate if seed % 2 else change_all)(data, change)
        return mutated[:max_size]

    torch.set_num_threads(1)
    limit_memory()
    defaults = [f"-timeout={TIMEOUT_S}", f"-artifact_prefix={args.corpus.parent}/{args.target}-"]
    atheris.Setup(
        [sys.argv[0], str(args.corpus), *defaults, *options], attempt, custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
