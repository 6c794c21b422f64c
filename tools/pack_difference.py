"""Store a model as its difference from a bundled one, in a quarter of the bytes.

    python tools/pack_difference.py runs/tiny-msssim/model -o cmamba_ref/pretrained/tiny-msssim

The folder's name becomes the model's.  The weights change slightly, and with them the model's id:
measure what was stored.  Before its base is replaced, write such a model whole, with
`save_pretrained`, to be packed anew afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from cmamba_ref import CMambaError, bundled
from cmamba_ref.atomic_write import write_atomically
from cmamba_ref.config import CMambaConfig
from cmamba_ref.model_id import WEIGHTS_FILE
from cmamba_ref.weight_difference import DIFFERENCE_FILE, id_in, pack
from cmamba_ref.weights import CONFIG_FILE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder with a model in float16")
    parser.add_argument("--base", default="tiny", choices=bundled.pretrained_names())
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    args = parser.parse_args(argv)
    try:
        arrays, base = (
            load_file(folder / WEIGHTS_FILE)
            for folder in (args.model, bundled.PRETRAINED / args.base)
        )
        data = pack(arrays, base)
        config = CMambaConfig.from_json((args.model / CONFIG_FILE).read_text())
        named = dataclasses.replace(config, name=args.output.resolve().name)
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output / DIFFERENCE_FILE, data)
        write_atomically(args.output / CONFIG_FILE, named.to_json().encode())
    except (CMambaError, OSError, SafetensorError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(data):,} bytes, model id {id_in(data).hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
