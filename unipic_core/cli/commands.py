"""The command line: compose pictures, describe a checkpoint, convert one, merge LoRAs. See `unipic --help`.

Exit codes: 0 success; 2 bad input, with one line on stderr; 1 unexpected error; 130 interrupted. --debug shows
tracebacks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from .terminal import DEFAULT_MODEL, DTYPES, layers_added, message_of, printable, progress_bar, readable_warnings

ENDINGS = (".png", ".webp", ".jpg", ".jpeg")
STORAGE_DTYPES = ("bf16", "fp32", "fp8_scaled")
SOURCE = "pipeline folder, transformer folder, or a .safetensors or .bin file"
INSTALL = 'pip install -c constraints.txt -e ".[pipeline]"'
LORA = "FILE[=STRENGTH]"
OVERWRITE = "replace DST if it exists"
REPEATABLE = "repeatable; default strength 1"
CAUSAL_NOTE = (
    "If the weights have a causal attention form (see `unipic info`), only unipic and the node Load UniPic compute it: "
    "other programs compute full attention and give wrong pictures without an error."
)

EXAMPLES = """examples:
  unipic compose person.png guitar.png --prompt "Put the guitar from image 2 in the hands of the person from image 1"
  unipic compose a.png b.png c.png --prompt "..." --model Unipic3-DMD --size 1024x768 --steps 8 --cfg 1 --seed 7
  unipic info Unipic3-DMD
  unipic convert Unipic3-Consistency-Model unipic3.safetensors --dtype fp8_scaled
  unipic merge Unipic3 unipic3-fast --lora unipic_distill.safetensors --lora style.safetensors=0.5"""


class Parser(argparse.ArgumentParser):
    """Argument parser that prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding
    args = parser().parse_args(argv)
    try:
        with readable_warnings(args.debug):
            args.run(args)
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


# --- arguments -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    top = Parser(
        prog="unipic",
        description="Compose one to six pictures and a prompt into a new picture with UniPic 3.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"unipic {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="compose | info | convert | merge")
    _compose_arguments(commands.add_parser("compose", help="pictures and a prompt in, a picture out"))
    info = commands.add_parser("info", help="describe a checkpoint, a LoRA or a model folder, without loading it")
    info.add_argument("path", type=path_argument, help="folder or file")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=run_info)
    convert = commands.add_parser(
        "convert", help="write a transformer as one safetensors file that ComfyUI reads", description=CAUSAL_NOTE
    )
    convert.add_argument("src", type=path_argument, help=SOURCE)
    convert.add_argument("dst", type=path_argument, help="the file to write")
    convert.add_argument(
        "--dtype", type=dtype_argument, choices=STORAGE_DTYPES, default="bf16", help="default: %(default)s"
    )
    convert.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    convert.set_defaults(run=run_convert)
    merge = commands.add_parser(
        "merge", help="add LoRAs to a transformer's weights: one file, or a model folder", description=CAUSAL_NOTE
    )
    merge.add_argument("src", type=path_argument, help=SOURCE)
    merge.add_argument(
        "dst",
        type=path_argument,
        help="a name that ends in .safetensors: one file for ComfyUI; any other: a folder for diffusers, with the text "
        "encoder and the other parts of SRC",
    )
    merge.add_argument("--lora", type=lora_argument, action="append", required=True, metavar=LORA, help=REPEATABLE)
    merge.add_argument(
        "--dtype", type=dtype_argument, choices=STORAGE_DTYPES, help="default: that of SRC; folders cannot be fp8"
    )
    merge.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    merge.set_defaults(run=run_merge)
    for command in (*commands.choices.values(),):
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return top


def _compose_arguments(p: argparse.ArgumentParser) -> None:
    p.description = "Pictures and a prompt in, a picture out. The prompt counts the pictures: image 1, image 2, ..."
    p.set_defaults(run=run_compose)
    p.add_argument("images", nargs="*", type=path_argument, metavar="IMAGE", help="one to six pictures, in order")
    p.add_argument("--prompt", "-p", required=True, help="the picture to compose, in words")
    p.add_argument("--negative", default=" ", help="the prompt to lead away from, with --cfg above 1 (default: empty)")
    p.add_argument("--out", "-o", type=output_argument, default=Path("out.png"), help="PNG, WebP or JPEG (%(default)s)")
    p.add_argument(
        "--sheet", type=output_argument, metavar="FILE", help="also write inputs, prompt and results as one picture"
    )
    p.add_argument("--overwrite", action="store_true", help="replace OUT and the sheet if they exist")
    p.add_argument(
        "--size", type=size_argument, metavar="WxH", help="multiples of 16 (default: the first picture's aspect)"
    )
    p.add_argument(
        "--aspect", metavar="W:H", help="aspect of the new picture, such as 16:9, at the size the weights were made for"
    )
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument(
        "--num-images", type=int, default=1, help="this many, with seeds SEED, SEED+1, ...; named OUT-SEED.png"
    )
    p.add_argument(
        "--share",
        metavar="NAME",
        default="release",
        help="division of the pixels that all pictures share: release = one scale, equal = equal areas (%(default)s)",
    )
    p.add_argument(
        "--reference-weights",
        type=weights_argument,
        metavar="W,W,...",
        help="one factor on the share of each picture; 4 doubles the sides of a small picture beside a large one",
    )
    p.add_argument(
        "--boxes",
        metavar="JSON",
        help='where pictures go: \'[{"id": "image_2", "bbox": [top, left, bottom, right]}]\' on a grid of 1000, or a '
        "file of it",
    )
    p.add_argument(
        "--strengths",
        type=weights_argument,
        metavar="S,S,...",
        help="factor on the attention to each picture: 1 = as without, 0 = none",
    )
    p.add_argument(
        "--ranges",
        type=ranges_argument,
        metavar="A-B,A-B,...",
        help="part of the run in which box and strength of each picture count, such as 0-1,0-0.5",
    )
    weights = p.add_argument_group("weights")
    weights.add_argument(
        "--model", type=path_argument, default=DEFAULT_MODEL, help="model folder (default: bundled unipic-nano)"
    )
    weights.add_argument(
        "--transformer", type=path_argument, help="folder or file of the network, in place of --model's"
    )
    weights.add_argument("--lora", type=lora_argument, action="append", default=[], metavar=LORA, help=REPEATABLE)
    sampling = p.add_argument_group("sampling (default: from the weights' recipe)")
    sampling.add_argument("--steps", type=int, help="number of steps")
    sampling.add_argument("--cfg", type=float, help="guidance scale; 0 or 1 switches it off and halves the time")
    sampling.add_argument("--sampler", metavar="NAME", help="consistency, for few-step weights, or euler")
    sampling.add_argument(
        "--reference-budget", type=int, metavar="PIXELS", help="side of the square all pictures share"
    )
    sampling.add_argument(
        "--schedule",
        metavar="NAME",
        default="auto",
        help="times of the steps: auto (from the weights' recipe), base (the release's base weights, and its Euler "
        "demo of few-step ones), few_step, or fixed_shift (linear, shifted by --shift)",
    )
    sampling.add_argument("--shift", type=float, metavar="K", help="time shift of --schedule fixed_shift (default: 3)")
    machine = p.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    machine.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU, fp32 on a CPU"
    )
    machine.add_argument(
        "--attention",
        metavar="NAME",
        default="sdpa",
        help="sdpa (default), matmul, or, if their packages are installed, flash or sage; sage rounds to 8 bits",
    )
    machine.add_argument("--compile", action="store_true", help="compile the network: minutes, then faster steps")
    machine.add_argument(
        "--storage",
        metavar="NAME",
        default="auto",
        help="storage of the network's matrices: fp8 halves their memory, full = in --dtype; auto: fp8 if the file is "
        "in fp8",
    )
    machine.add_argument(
        "--condition-cache",
        metavar="NAME",
        default="auto",
        help="cache of the references of causal weights: gpu, cpu (main memory), off (computed in every step); auto: "
        "the first of these that has room",
    )
    machine.add_argument(
        "--cache-dtype",
        metavar="NAME",
        default="auto",
        help="numbers of that cache: auto = as computed; int8 = half the memory of bf16 with a small error",
    )


def size_argument(text: str) -> tuple[int, int]:
    """Parse "1024x768" to (1024, 768)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1024x768, got {text!r}") from None
    return width, height


def weights_argument(text: str) -> list[float]:
    """Parse "1,4" to [1.0, 4.0]."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number for each picture such as 1,4, got {text!r}") from None


def ranges_argument(text: str) -> list[tuple[float, float]]:
    """Parse "0-1,0.2-0.5" to [(0.0, 1.0), (0.2, 0.5)]."""
    try:
        ranges = [tuple(float(end) for end in part.split("-")) for part in text.split(",")]
        return [(start, end) for start, end in ranges]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a range for each picture such as 0-1,0-0.5, got {text!r}") from None


def path_argument(text: str) -> Path:
    """Parse a path; refuse an empty one, which Path reads as the current folder, and a web address."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(f"expected a path, got the address {text[:100]!r}; download it first")
    return Path(text)


def lora_argument(text: str) -> tuple[Path, float]:
    """Parse "FILE" or "FILE=STRENGTH" to (path, strength)."""
    match = re.fullmatch(r"(.+)=([^=]*)", text)
    if match is None or os.path.exists(text):
        return path_argument(text), 1.0
    try:
        return Path(match[1]), float(match[2])
    except ValueError:
        if os.path.exists(match[1]):
            raise argparse.ArgumentTypeError(
                f"the strength of {match[1]} should be a number, got {match[2]!r}"
            ) from None
        return Path(text), 1.0


def dtype_argument(text: str) -> str:
    """Parse a storage dtype; "fp8" is short for "fp8_scaled"."""
    return "fp8_scaled" if text == "fp8" else text


def output_argument(text: str) -> Path:
    """Parse the path of an output picture: a known ending, in an existing, writable folder."""
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"{text!r} should end in {', '.join(ENDINGS)}")
    try:
        mistake = "is a folder; name a file in it" if path.is_dir() else ""
        if not path.parent.is_dir():
            mistake = f"cannot be written: no folder {path.parent}"
        elif not mistake and not os.access(path if path.exists() else path.parent, os.W_OK):
            mistake = "may not be written; choose another place"
    except OSError as error:
        mistake = f"cannot be written: {error.strerror}"
    if mistake:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} {mistake}")
    return path


# --- commands ------------------------------------------------------------------------------------------------------


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
    from ..replacing import require_new
    from ..weights.convert import convert

    require_new(args.dst, args.overwrite)
    with progress_bar("converting", unit="B") as advance:
        path = convert(args.src, args.dst, dtype=args.dtype, progress=advance)
    print(printable(path))


def run_merge(args: argparse.Namespace) -> None:
    """Write a checkpoint with LoRAs added to its weights."""
    from ..weights.merge import merge

    with progress_bar("merging", unit="B") as advance:
        reports = merge(args.src, args.dst, args.lora, dtype=args.dtype, overwrite=args.overwrite, progress=advance)
    for (path, strength), report in zip(args.lora, reports, strict=True):
        print(layers_added(path, strength, report), file=sys.stderr)
    print(printable(args.dst))
