"""The command line: compose pictures, describe a checkpoint, convert one, merge LoRAs. See `unipic --help`.

Exit codes: 0 success; 2 bad input, with one line on stderr; 1 unexpected error; 130 interrupted. --debug shows
tracebacks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .arguments import parser
from .terminal import layers_added, message_of, printable, progress_bar, readable_warnings

INSTALL = 'pip install -c constraints.txt -e ".[pipeline]"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding
    args = parser().parse_args(argv)
    try:
        with readable_warnings(args.debug):
            COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        print("interrupted; no partial file is left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        absent = absent_package(error)
        expected = absent is not None or isinstance(error, (ValueError, OSError))
        text = absent or with_flags(printable(" ".join(message_of(error).split()))) or type(error).__name__
        if not expected:
            text = f"unexpected {type(error).__name__}: {text} (run again with --debug and report it)"
        print(f"unipic: {text}", file=sys.stderr)
        return 2 if expected else 1


FLAGS = {
    "transformer=": "--transformer",
    'device="cpu"': "--device cpu",
    "torch.bfloat16": "--dtype bf16",
    "torch.float32": "--dtype fp32",
    "overwrite=True": "--overwrite",
    'storage="fp8"': "--storage fp8",
    "condition_cache": "--condition-cache",
    "cache_dtype": "--cache-dtype",
}
"""Argument of the Python API, as its errors name it -> flag of the command line."""


def with_flags(text: str) -> str:
    """Replace arguments of the Python API in an error's text by the command line's flags."""
    for python, flag in FLAGS.items():
        text = text.replace(python, flag)
    return text


def absent_package(error: Exception) -> str | None:
    """Message with the command to install a package that the error reports missing; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return None
    return f"this needs the package {package}, which is not installed; in the folder of this pack: {INSTALL}"


def run_compose(args: argparse.Namespace) -> None:
    """Compose pictures and write them."""
    from .compose import compose

    compose(args)


def run_info(args: argparse.Namespace) -> None:
    """Print a description of a path."""
    from ..weights.describe import describe, format_description

    table = describe(args.path)
    print(json.dumps(table, indent=2) if args.json else printable(format_description(table), keep="\n"))


def run_convert(args: argparse.Namespace) -> None:
    """Write a transformer as one safetensors file."""
    from ..weights.convert import convert

    with progress_bar("converting", unit="B") as advance:
        path = convert(args.src, args.dst, dtype=args.dtype, overwrite=args.overwrite, progress=advance)
    print(printable(path))


def run_merge(args: argparse.Namespace) -> None:
    """Write a checkpoint with LoRAs added to its weights."""
    from ..weights.merge import merge

    with progress_bar("merging", unit="B") as advance:
        reports = merge(args.src, args.dst, args.lora, dtype=args.dtype, overwrite=args.overwrite, progress=advance)
    for (path, strength), report in zip(args.lora, reports, strict=True):
        print(layers_added(path, strength, report), file=sys.stderr)
    print(printable(args.dst))


COMMANDS = {"compose": run_compose, "info": run_info, "convert": run_convert, "merge": run_merge}
