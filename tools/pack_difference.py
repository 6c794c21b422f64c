"""Store a model as its difference from a bundled one, in about a third of the bytes.

    python tools/pack_difference.py runs/tiny-msssim/model -o cmamba_ref/pretrained/tiny-msssim

The folder's name becomes the model's.  The weights change slightly, and with them the model's id:
measure what was stored.  Before its base is replaced, write such a model whole, with
`save_pretrained`; packed anew, it is another model, which does not decode the files of the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from safetensors.numpy import load

from cmamba_ref import CMamba, CMambaError, bundled
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.model_id import WEIGHTS_FILE
from cmamba_ref.weight_difference import DIFFERENCE_FILE, pack
from cmamba_ref.weights import CONFIG_FILE, to_bytes


def store(model: CMamba, base: CMamba, folder: Path) -> int:
    """Write a model into a folder, as its difference from another; return the size in bytes.

    Raises:
        CMambaError: they do not fit each other, or the folder holds a model that is stored whole.
        OSError: the folder cannot be written.
    """
    if (folder / WEIGHTS_FILE).exists():
        raise CMambaError(f"{str(folder)!r} holds a model that is stored whole; choose another")
    data = pack(load(to_bytes(model)), load(to_bytes(base)))
    config = dataclasses.replace(model.config, name=folder.resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / DIFFERENCE_FILE, data)
    write_atomically(folder / CONFIG_FILE, config.to_json().encode())
    return len(data)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = sorted(path.parent.name for path in bundled.PRETRAINED.glob(f"*/{WEIGHTS_FILE}"))
    parser.add_argument("model", type=Path, help="a folder with a model in float16")
    parser.add_argument("--base", default="tiny", choices=whole, help="default: tiny")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        model, base = CMamba.from_pretrained(args.model), CMamba.from_pretrained(args.base)
        size = store(model, base, args.output)
        model_id = CMamba.from_pretrained(args.output).model_id
    except (CMambaError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{size:,} bytes, model id {model_id.hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
