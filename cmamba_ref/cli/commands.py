"""The command `cmamba`: encode, decode, verify, info, demo, integrate.

Expected errors (a `CMambaError`, an `OSError`) become one line on stderr and exit code 1; wrong
usage exits with 2, Ctrl-C with 130, SIGTERM with 143. Every output is written atomically, and
replaces an existing file only with `--force`.

`encode` and `decode` take one file, or with `cmamba_ref.cli.batch` many files and folders. `-` is
standard input or output; messages go to stderr where the output goes to stdout.

This module imports nothing heavy: torch and Pillow come in with the command that needs them.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cmamba_ref.atomic_write import check_writable, write_atomically
from cmamba_ref.cli import batch, stdio
from cmamba_ref.cli.integrate import INTEGRATIONS, heading
from cmamba_ref.cli.stdio import STREAM
from cmamba_ref.cli.threads import use_one_thread_if_busy
from cmamba_ref.cli.warning_lines import no_native_output, warning_lines
from cmamba_ref.codec import files
from cmamba_ref.codec.files import DecodeOptions, EncodeOptions
from cmamba_ref.errors import (
    BitstreamError,
    CMambaError,
    InvalidArgumentError,
    UsageError,
    explain,
    printable,
)

if TYPE_CHECKING:
    from cmamba_ref.codec.refinement import Progress
    from cmamba_ref.model import CMamba

COUNTING = "cmamba: {n_fmt}/{total_fmt} |{bar}| {elapsed} elapsed, {remaining} left"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; `None` for those of the process.

    Returns:
        the exit code: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C.

    Raises:
        SystemExit: from argparse: 2 after wrong usage, 0 after `--help` and `--version`.
    """
    args = _parse(argv)
    # A file's name need not be text in the terminal's encoding.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    inputs = getattr(args, "inputs", ())
    name = stdio.label(inputs[0], "input") if len(inputs) == 1 else ""
    try:
        with warning_lines(name, _warn):
            code = args.command(args)
            stdio.flush_output()
            return code
    except KeyboardInterrupt:
        print("cmamba: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        return max(_fail(reason), 2 * isinstance(error, UsageError))


def run() -> NoReturn:
    """The command itself: `main`, then the end of the process.

    SIGTERM ends it by an exception, so that a half-written file is removed and the processes of a
    batch end too. What torch imported is never collected: walking through it would take 0.3 s.
    """
    stdio.open_closed_streams()
    signal.signal(signal.SIGTERM, _end)
    code = main()
    gc.freeze()
    with suppress(OSError):  # that of a command which failed by it
        stdio.flush_output()
    sys.exit(code)


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


# ---------------------------------------------------------------- commands


def _encode(args: argparse.Namespace) -> int:
    """One image; `_many` for several and for folders."""
    options = _encode_options(args)
    if (pair := _single(args, "encode", ".cmb")) is None:
        return _many(args, "encode", ".cmb", options)
    source, target = pair
    _check_target(target, source, args.force)
    if target.suffix.lower() in batch.OUTPUT_SUFFIXES["decode"]:
        raise UsageError(f"`-o` must end in .cmb, got {str(target)!r}; end a folder in /")
    _check_time(args, source, target)
    with _stages(4) as begin:
        begin("reading")
        from cmamba_ref.codec.verify import verify_encoded
        from cmamba_ref.metrics import bits_per_pixel

        data = stdio.read_input(source)
        with no_native_output():
            read = files.read_source(data, stdio.label(source, "input"), options)
        begin("loading the model")
        model = load_model(args.model, args.device, options)
        begin("encoding")
        start = time.perf_counter()
        with _search() if args.effort else nullcontext() as progress:
            data, quality = files.encode_source(read, model, options, progress)
        seconds = time.perf_counter() - start
        begin("writing and verifying" if args.verify else "writing")
        decoded = None

        def check(written: bytes) -> None:
            nonlocal decoded
            with _naming(target, "output"):
                decoded = verify_encoded(written, data, read.image, model, **files.limits(options))

        time_from = source if args.keep_time else None
        _write(target, data, check if args.verify else None, time_from=time_from)
        files.warn_of_graphics(read, model, options, quality, data, decoded)
    height, width = read.image.shape[:2]
    bpp = bits_per_pixel(len(data), width, height)
    found = "" if quality is None else f", quality {quality:g}"
    verified = ", verified" if args.verify else ""
    _say(
        target,
        f"{len(data)} bytes, {bpp:.3f} bpp{found}, {width}x{height}, "
        f"encoded in {seconds:.2f} s{verified}",
    )
    if read.dropped:
        _say(target, f"dropped {', '.join(read.dropped)}; --keep-metadata keeps it")
    return 0


def _decode(args: argparse.Namespace) -> int:
    """One file; `_many` for several and for folders."""
    options = DecodeOptions(**_chosen(args, DecodeOptions))
    suffix = f".{args.format or 'png'}"
    if (pair := _single(args, "decode", suffix)) is None:
        _check_output(suffix, args.output_quality)
        return _many(args, "decode", suffix, options)
    source, target = pair
    if target != STREAM:
        suffix = _suffix_of(target, args.format)
    _check_output(suffix, args.output_quality)
    _check_target(target, source, args.force)
    _check_time(args, source, target)
    with _stages(4) as begin:
        begin("reading")
        from cmamba_ref.codec import decode_container, model_for
        from cmamba_ref.codec.container import Container
        from cmamba_ref.codec.output import image_bytes

        data = stdio.read_input(source)
        begin("loading the model")
        model = load_model(args.model, args.device)
        begin("decoding")
        start = time.perf_counter()
        with _naming(source, "input"):
            file = Container.unpack(data)
            model = model_for(file.model_id, [model])
            image = decode_container(file, model, **files.limits(options))
        seconds = time.perf_counter() - start
        begin("writing")
        output = image_bytes(image, suffix, file.metadata, args.output_quality, args.max_side)
        _write(target, output, time_from=source if args.keep_time else None)
    height, width = image.shape[:2]
    colours = ("grey" if file.grey else "RGB") + ("" if file.alpha is None else " with alpha")
    content = ", ".join([colours, *file.metadata.names()])
    is_shrunk = args.max_side is not None and max(image.shape[:2]) > args.max_side
    shrunk = f", shrunk to {args.max_side} pixels" if is_shrunk else ""
    _say(target, f"{width}x{height} {content}, decoded in {seconds:.2f} s{shrunk}")
    return 0


def _many(
    args: argparse.Namespace, command: str, suffix: str, options: EncodeOptions | DecodeOptions
) -> int:
    """Several files, or folders of them: by several processes, and with a summary at the end."""
    from tqdm import tqdm

    output = None if args.output is None else stdio.parse_path(args.output)
    stdio.check_alone(args.inputs, output)
    processes = _process_count(args.jobs, args.device)
    found = batch.find(args.inputs, command)
    tasks, refused = batch.with_targets(found.files, output, suffix)
    waiting = batch.to_do(tasks, args.force)
    wanted = options if isinstance(options, EncodeOptions) else None
    load = partial(load_model, args.model, args.device, wanted)
    job = batch.Job(load, options)
    failed = [*found.failed, *refused]
    summary = batch.Summary(command, len(tasks) - len(waiting), found.left_out_line())
    count = len(failed) + len(waiting)
    with tqdm(total=count, bar_format=COUNTING, leave=False, disable=None) as bar:

        def report(outcome: batch.Outcome) -> None:
            summary.add(outcome)
            for line in outcome.warnings:
                _warn(line)
            if outcome.error:
                bar.write(f"cmamba: error: {outcome.error}", file=sys.stderr)
            bar.update()

        for outcome in failed:
            report(outcome)
        batch.run(waiting, job, processes, report)
    print(summary)
    return 1 if summary.failed else 0


def _verify(args: argparse.Namespace) -> int:
    """A line per file as it is done, and a summary; 1 if one is bad or could not be checked."""
    from tqdm import tqdm

    stdio.check_alone(args.inputs)
    processes = _process_count(args.jobs, args.device)
    found = batch.find(args.inputs, "verify")
    tasks = batch.without_targets(found.files)
    options = DecodeOptions(**_chosen(args, DecodeOptions))
    job = batch.Job(partial(load_model, args.model, args.device), options)
    outcomes: list[batch.Outcome] = []
    count = len(found.failed) + len(tasks)
    with tqdm(total=count, bar_format=COUNTING, leave=False, disable=None) as bar:

        def report(outcome: batch.Outcome) -> None:
            outcomes.append(outcome)
            for line in outcome.warnings:
                _warn(line)
            if outcome.unchecked:
                line = f"not checked: {outcome.error}"
            elif outcome.error:
                line = f"bad: {outcome.error}"
            else:
                line = f"good: {printable(outcome.source)}: {outcome.detail}"
            bar.write(line, file=sys.stdout)
            bar.update()

        for outcome in found.failed:
            report(outcome)
        batch.run(tasks, job, processes, report)
    if found.left_out:
        print(found.left_out_line())
    print(batch.summarise_checks(outcomes))
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _info(args: argparse.Namespace) -> int:
    """Describe every file that can be read, also after one that cannot."""
    found = batch.find(args.inputs, "describe")
    described, worst = [], max((_fail(outcome.error) for outcome in found.failed), default=0)
    for path, _ in found.files:
        try:
            with _naming(path, "input"):
                facts = _describe(path)
        except UsageError:
            raise
        except (CMambaError, OSError) as error:
            worst = _fail(explain(error))
            continue
        if args.json:
            described.append(facts)
        else:
            print(_as_text(facts))
    if args.json:
        print(json.dumps(described, indent=1))
    return worst


def _demo(args: argparse.Namespace) -> int:
    from cmamba_ref.cli import demo

    args.output.mkdir(parents=True, exist_ok=True)
    encoded, decoded = (args.output / f"coffee{suffix}" for suffix in (".cmb", ".png"))
    for target in (encoded, decoded):
        _check_target(target, demo.DEMO_IMAGE, force=True)
    with _stages(4) as begin:
        begin("loading the model")
        start = time.perf_counter()
        model = load_model(args.model, args.device, EncodeOptions(quality=args.quality))
        loading = time.perf_counter() - start
        report = demo.run(model, args.quality, encoded, decoded, begin)
    print(report)
    print(f"The model was loaded in {loading:.2f} s. Wrote {encoded} and {decoded}.")
    return 0


def _integrate(args: argparse.Namespace) -> int:
    if args.name:
        print(INTEGRATIONS[args.name].text, end="")
    else:
        print("\n".join(f"{heading(name)}\n\n{i.text}" for name, i in INTEGRATIONS.items()), end="")
    return 0


# ---------------------------------------------------------------- what they share


def load_model(name: str | None, device: str, options: EncodeOptions | None = None) -> CMamba:
    """Load the model of `--model` on the device of `--device`; for None the bundled "tiny".

    By now torch is imported, which shows whether the cores are busy.

    Args:
        options: what the model has to encode, if it has to.

    Raises:
        UsageError: there is no such device, or the model cannot encode as `options` ask for.
        WeightsError: there is no such model.
    """
    from cmamba_ref.codec import DEFAULT_MODEL
    from cmamba_ref.model import CMamba

    use_one_thread_if_busy()
    try:
        model = CMamba.from_pretrained(DEFAULT_MODEL if name is None else name, device)
        if options is not None:
            files.check_model(model, options)
    except InvalidArgumentError as error:
        raise UsageError(str(error)) from error
    return model


def _single(args: argparse.Namespace, command: str, suffix: str) -> tuple[Path, Path] | None:
    """Return the input and where the output goes; None for several inputs and for a folder.

    `IN OUT` is `IN -o OUT` if OUT has a suffix of outputs. Without either, the output goes beside
    the input, and to stdout if the input comes from stdin. A folder is made where it is missing.
    """
    source, *others = args.inputs
    if os.path.isdir(source) or len(others) > 1:
        return None
    target, output = source.with_suffix(suffix), args.output
    if others:
        is_output = others[0].suffix.lower() in batch.OUTPUT_SUFFIXES[command]
        if output is not None or not is_output or os.path.isdir(others[0]):
            return None
        return source, others[0]
    if output is None:
        return source, STREAM if source == STREAM else target
    path = stdio.parse_path(output)
    is_folder = output.endswith(("/", os.sep)) or os.path.isdir(path)
    if is_folder and source == STREAM:
        raise UsageError(f"`-o` must be a file where IN is -, got the folder {output!r}; name one")
    if not is_folder:
        return source, path
    source.stat()  # before a folder is made for nothing
    path.mkdir(parents=True, exist_ok=True)
    return source, path / target.name


def _encode_options(args: argparse.Namespace) -> EncodeOptions:
    """Return what the options of `encode` say about reading, size and quality."""
    targets = {kind: getattr(args, f"target_{kind}") for kind in ("size", "bpp", "psnr")}
    target = next(((kind, value) for kind, value in targets.items() if value is not None), None)
    if args.nearest and target is None:
        raise UsageError("`--nearest` must come with a target, such as --target-size 20000")
    return EncodeOptions(target=target, **_chosen(args, EncodeOptions))


def _chosen(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the arguments that are fields of `EncodeOptions` or `DecodeOptions`."""
    return {field.name: vars(args)[field.name] for field in fields(kind) if field.name in args}


def _suffix_of(target: Path, chosen: str | None) -> str:
    """Return the suffix of the file to decode to, which says the format.

    Raises:
        UsageError: it is of no format to decode to, or of another one than `--format` says.
    """
    suffix, known = target.suffix.lower(), batch.OUTPUT_SUFFIXES["decode"]
    if suffix not in known:
        raise UsageError(
            f"`-o` must end in one of {', '.join(known)}, got {str(target)!r}; "
            "end a folder in /; for other formats convert a PNG file, which loses nothing"
        )
    if chosen and suffix.replace("jpeg", "jpg") != f".{chosen}":
        raise UsageError(f"`--format` must fit `-o`, got {chosen} and {str(target)!r}; leave it")
    return suffix


def _check_output(suffix: str, quality: int | None) -> None:
    """Refuse `--output-quality` where the format has none."""
    if quality is not None and suffix == ".png":
        raise UsageError(
            f"`--output-quality` must come with JPEG or WebP, got {quality} for PNG; leave it, or "
            "name a .jpg or .webp file (several files, standard output: --format jpg)"
        )


def _check_time(args: argparse.Namespace, source: Path, target: Path) -> None:
    """Refuse `--keep-time` where a stream has no time."""
    if args.keep_time and STREAM in (source, target):
        raise UsageError("`--keep-time` must have files on both sides, got -; leave it")


def _write(
    target: Path,
    data: bytes,
    check: Callable[[bytes], None] | None = None,
    time_from: Path | None = None,
) -> None:
    """Write a file, or to stdout; of a file `check` is given what can be read back from it."""
    if target == STREAM:
        if check:
            check(data)
        stdio.write_output(data)
    else:
        of_file = check and (lambda path: check(path.read_bytes()))
        write_atomically(target, data, of_file, time_from=time_from)


def _say(target: Path, message: str) -> None:
    """Report what was written: on stdout, unless that is what was written to."""
    out = sys.stderr if target == STREAM else sys.stdout
    print(f"{stdio.label(target, 'output')}: {message}", file=out)


def _process_count(jobs: int | None, device: str) -> int:
    """The number of processes: on the CPU as many as cores, unless told otherwise."""
    if device == "cpu":
        return jobs or batch.core_count()
    if jobs not in (None, 1):
        raise UsageError(f"`--jobs` must be 1 with --device {device}, got {jobs}; leave it out")
    return 1


def _check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse before the work what could not, or should not, be written after it.

    Raises:
        InvalidArgumentError: `target` exists, is the input, or lies in no directory; or it is
            stdout, which is a terminal.
        OSError: `source` does not exist, or `target` cannot be written.
    """
    if target == STREAM:
        stdio.check_output()
        return
    if source != STREAM:
        source.stat()  # first: without -o, a mistyped input would be told as a wrong output
    if not os.path.isdir(os.path.dirname(os.path.realpath(target))):
        raise InvalidArgumentError(
            f"`-o` must lie in an existing directory, got {str(target)!r}; make it first"
        )
    if not target.exists():
        check_writable(target)
        return
    if not target.is_file():
        raise InvalidArgumentError(f"`-o` must be a file, got {str(target)!r}; choose another name")
    if source != STREAM and target.samefile(source):
        raise InvalidArgumentError(
            f"`-o` must differ from the input, got {str(target)!r} for both; choose another name"
        )
    if not force:
        raise InvalidArgumentError(
            f"`-o` must not exist yet, got {str(target)!r}; "
            "choose another name, or replace it with --force"
        )
    check_writable(target)


def _describe(path: Path) -> dict[str, object]:
    """Return the content of a file, as `info --json` prints it, after checking its checksums."""
    from cmamba_ref.bundled import name_of
    from cmamba_ref.codec.container import Container
    from cmamba_ref.entropy.latent_prefix import QUALITY_UNITS, unpack_latent
    from cmamba_ref.entropy.rans import lane_count
    from cmamba_ref.metrics import bits_per_pixel

    data = stdio.read_input(path)
    container = Container.unpack(data)
    prefix, y_stream = unpack_latent(container.y)
    return {
        "file": "standard input" if path == STREAM else str(path),
        "format": container.version,
        "model": container.model_id.hex(),
        "model_name": name_of(container.model_id),
        "width": container.width,
        "height": container.height,
        "grey": container.grey,
        "alpha_bytes": None if container.alpha is None else len(container.alpha),
        "metadata_bytes": {k: len(v) for k, v in container.metadata.present().items()},
        "quality": prefix.quality / QUALITY_UNITS if prefix.quality else None,
        "bytes": len(data),
        "bpp": bits_per_pixel(len(data), container.width, container.height),
        "y": {
            "bytes": len(container.y),
            "lanes": lane_count(y_stream),
            "shift": prefix.shift,
            "skipped_tables": prefix.skipped,
        },
        "z": {"bytes": len(container.z), "lanes": lane_count(container.z)},
    }


def _as_text(facts: dict[str, Any]) -> str:
    """What `_describe` found, in lines of text."""
    y, z, metadata = facts["y"], facts["z"], facts["metadata_bytes"]
    known = facts["model_name"] or "not bundled with this version"
    alpha = "" if facts["alpha_bytes"] is None else f", alpha ({facts['alpha_bytes']} bytes)"
    colours = "grey" if facts["grey"] else "colour"
    rows = {
        "format": f"version {facts['format']}, checksums correct",
        "model": f"{facts['model']} ({known})",
        "image": f"{facts['width']}x{facts['height']}, {colours}{alpha}",
        "metadata": ", ".join(f"{name} ({size} bytes)" for name, size in metadata.items())
        or "none",
        "quality": f"{facts['quality']:g}" if facts["quality"] else "fixed-rate model",
        "size": f"{facts['bytes']} bytes, {facts['bpp']:.3f} bits per pixel",
        "y": f"{y['bytes']} bytes, lanes: {y['lanes']}, shift: {y['shift']}, "
        f"skipped tables: {y['skipped_tables']}",
        "z": f"{z['bytes']} bytes, lanes: {z['lanes']}",
    }
    return "\n".join(
        [printable(facts["file"]), *(f"  {row:<8}  {value}" for row, value in rows.items())]
    )


@contextmanager
def _naming(path: Path, stream: str) -> Iterator[None]:
    """Name the refused file: the codec sees only bytes."""
    try:
        yield
    except BitstreamError as error:
        raise type(error)(f"{stdio.label(path, stream)}: {error}") from error


@contextmanager
def _stages(count: int) -> Iterator[Callable[[str], None]]:
    """A line on stderr, if that is a terminal, that names the stage at work; gone at the end."""
    if not sys.stderr.isatty():  # to import tqdm takes a tenth of decoding an image
        yield lambda stage: None
        return
    from tqdm import tqdm

    form = "cmamba: {desc} (stage {n} of {total})"
    # The delay, however short, keeps tqdm from drawing a stage 0 without a name.
    shown = {"leave": False, "disable": None, "mininterval": 0, "delay": 1e-6}
    with tqdm(total=count, bar_format=form, **shown) as bar:

        def begin(stage: str) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.update()

        yield begin


@contextmanager
def _search() -> Iterator[Progress]:
    """A line on stderr, if that is a terminal, about a search, which Ctrl-C ends, once.

    A second Ctrl-C ends the command.
    """
    from tqdm import tqdm

    is_ended = False

    def end(*_: object) -> None:
        nonlocal is_ended
        is_ended = True
        signal.signal(signal.SIGINT, before)

    form = "cmamba: step {n_fmt} of {total_fmt}, {remaining} left; Ctrl-C keeps the best so far"
    with tqdm(bar_format=form, leave=False, disable=None, delay=1e-6) as bar:

        def progress(done: int, total: int) -> bool:
            if done == 1:
                bar.reset(total)
            bar.update()
            if is_ended:
                _warn(f"the search was ended after step {done} of {total}")
            return is_ended

        before = signal.signal(signal.SIGINT, end)
        try:
            yield progress
        finally:
            signal.signal(signal.SIGINT, before)


def _warn(line: str) -> None:
    """Report a warning in one line, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(f"cmamba: warning: {line}", file=sys.stderr)


def _fail(reason: str | None) -> int:
    """Report an expected error in one line."""
    print(f"cmamba: error: {reason}", file=sys.stderr)
    return 1


# ---------------------------------------------------------------- arguments


class _Version(argparse.Action):
    """`--version`, which imports the package only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from cmamba_ref import __version__

        print(f"cmamba {__version__}")
        parser.exit()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; further inputs may follow options, which argparse by itself refuses."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    end = rest.index("--") if "--" in rest else len(rest)
    paths = rest[:end] + rest[end + 1 :]
    is_unknown = any(text.startswith("-") and text != "-" for text in rest[:end])
    if "inputs" not in args or is_unknown or "" in paths:
        parser.parse_args(argv)  # says what is wrong, if something is
    else:
        args.inputs += map(stdio.parse_path, paths)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cmamba", description="Images to small files and back, with a learned codec."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    encode = commands.add_parser("encode", help="images to .cmb", parents=[_model_options()])
    _add_files(
        encode,
        "an image in any format that Pillow reads, or a folder of them; - is standard input; "
        "IN OUT.cmb is the same as IN -o OUT.cmb",
        ".cmb",
    )
    _add_quality(encode, targets=True)
    encode.add_argument(
        "--effort",
        type=int,
        choices=range(10),
        default=0,
        metavar="N",
        help="0 (fast) to 9 (250 steps): search longer for a better file, of more PSNR at about "
        "the same size; decoding stays as fast (default: 0)",
    )
    encode.add_argument(
        "--nearest",
        action="store_true",
        help="where no quality reaches the target, take the nearest file (default: an error)",
    )
    encode.add_argument(
        "--verify",
        action="store_true",
        help="decode each file that was written and check its symbols, before it gets its name",
    )
    encode.add_argument(
        "--keep-metadata",
        action="store_true",
        help="keep EXIF, XMP and the ICC profile, with pixels in its colour space; with "
        "--background the profile is applied instead (default: drop all, convert to sRGB)",
    )
    encode.add_argument(
        "--background",
        type=_colour,
        metavar="COLOUR",
        help="lay transparent images onto a colour, such as white or #336699 (default: keep alpha)",
    )
    encode.add_argument(
        "--strict-color",
        action="store_true",
        help="refuse images whose colour profile cannot be applied (default: ignore it, with a "
        "warning)",
    )
    encode.add_argument(
        "--lenient",
        action="store_true",
        help="read what there is of damaged and truncated images, with a warning (default: refuse "
        "them)",
    )
    encode.add_argument(
        "--convert",
        action="store_true",
        help="convert images of 16 bits to 8, and CMYK to sRGB, by its profile if there is one "
        "(default: refuse them)",
    )
    encode.set_defaults(command=_encode)

    decode = commands.add_parser(
        "decode",
        help=".cmb to PNG, JPEG or WebP",
        parents=[_model_options("the bundled model that made the file")],
    )
    _add_files(
        decode,
        "a .cmb file, or a folder of them; - is standard input; IN OUT.png is the same as "
        "IN -o OUT.png, also for .jpg and .webp",
        ".png",
    )
    decode.add_argument(
        "--format",
        choices=("png", "jpg", "webp"),
        help="format of the output (default: by the suffix of OUT, otherwise png)",
    )
    decode.add_argument(
        "--output-quality",
        type=_percent,
        metavar="Q",
        help="1 to 100, of JPEG and WebP; PNG loses nothing (default: 95)",
    )
    decode.add_argument(
        "--max-side",
        type=_positive,
        metavar="N",
        help="shrink larger images to N pixels on their longer side, for previews",
    )
    decode.set_defaults(command=_decode)

    verify = commands.add_parser(
        "verify",
        help="check that .cmb files decode, writing nothing",
        parents=[_model_options("the bundled model that made the file")],
    )
    verify.add_argument(
        "inputs",
        type=stdio.parse_path,
        nargs="+",
        metavar="IN",
        help=".cmb files or folders of them, made by a bundled model or by --model",
    )
    _add_work(verify)
    verify.set_defaults(command=_verify)

    info = commands.add_parser("info", help="describe .cmb files and check their checksums")
    info.add_argument(
        "inputs",
        nargs="+",
        type=stdio.parse_path,
        metavar="IN",
        help="a .cmb file, or a folder of them; - is standard input",
    )
    info.add_argument("--json", action="store_true", help="print a JSON list, one entry per file")
    info.set_defaults(command=_info)

    demo = commands.add_parser(
        "demo",
        help="encode the bundled image, and compare with JPEG, WebP and AVIF",
        parents=[_model_options()],
    )
    demo.add_argument(
        "-o",
        dest="output",
        type=Path,
        default=Path("cmamba-demo"),
        metavar="DIR",
        help="where coffee.cmb and coffee.png go, replacing earlier ones (default: cmamba-demo)",
    )
    _add_quality(demo)
    demo.set_defaults(command=_demo)

    integrate = commands.add_parser(
        "integrate",
        help="print what makes desktops and other programs know .cmb files",
        description="Print what makes desktops and other programs know .cmb files. They run\n"
        "`cmamba`, which has to be in their PATH.",
        epilog="\n\n".join(map(heading, INTEGRATIONS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    integrate.add_argument(
        "--print",
        dest="name",
        choices=INTEGRATIONS,
        help="this text alone, to redirect it into its file (default: all, with headings)",
    )
    integrate.set_defaults(command=_integrate)
    return parser


def _model_options(
    default: str = "tiny; tiny-msssim is bundled too",
) -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--model",
        metavar="NAME|DIR|USER/REPO",
        help="a bundled model, a directory with one, or a repository of the Hugging Face Hub "
        f"(default: {default})",
    )
    parent.add_argument(
        "--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, mps, ... (default: cpu)"
    )
    return parent


def _add_files(parser: argparse.ArgumentParser, source: str, suffix: str) -> None:
    parser.add_argument(
        "inputs",
        type=stdio.parse_path,
        nargs="+",
        metavar="IN",
        help=source,
    )
    parser.add_argument(
        "-o",
        dest="output",
        type=stdio.checked_output,
        metavar="OUT",
        help="output file, in a folder that exists, or folder, created if missing; end it in / for "
        "a folder with one IN; - "
        f"is standard output (default: beside IN, with the suffix {suffix}; - where IN is -)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace existing files (default: an error, or with several files, skip them)",
    )
    parser.add_argument("--keep-time", action="store_true", help="keep the modification time of IN")
    _add_work(parser)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="number of worker processes, on the CPU (default: number of cores)",
    )
    parser.add_argument(
        "--max-pixels",
        type=_positive,
        metavar="N",
        help="refuse images of more than N pixels (default: 100 million)",
    )
    parser.add_argument(
        "--max-memory",
        type=_gibibytes,
        metavar="GIB",
        help="refuse images that would take more memory than this on the CPU "
        "(default: what is available)",
    )


def _add_quality(parser: argparse.ArgumentParser, *, targets: bool = False) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quality",
        type=float,
        metavar="Q",
        help="1 (small) to 8 (good), also in between, such as 3.5 (default: 4)",
    )
    if targets:
        for name, unit, text in (
            ("size", "BYTES", "95 to 100 %% of this size"),
            ("bpp", "BITS", "95 to 100 %% of these bits per pixel"),
            ("psnr", "DB", "at least this PSNR, and little more"),
        ):
            group.add_argument(
                f"--target-{name}",
                type=_above_zero,
                metavar=unit,
                help=f"the quality that gives {text}, in at most six encodes",
            )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _percent(text: str) -> int:
    if (value := _positive(text)) > 100:
        raise argparse.ArgumentTypeError(f"must be at most 100, got {text!r}")
    return value


def _colour(text: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        colour = ImageColor.getrgb(text)
    except ValueError:
        colour = ()
    if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):  # nor one with alpha
        raise argparse.ArgumentTypeError(
            f"must be a colour, such as white or #336699, got {text!r}"
        )
    return colour


def _gibibytes(text: str) -> int:
    return int(_above_zero(text) * 2**30)


def _above_zero(text: str) -> float:
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
