"""Arguments of the command line: `unipic compose | info | convert | merge`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .. import __version__
from .argument_types import (
    dtype_argument,
    lora_argument,
    output_argument,
    path_argument,
    ranges_argument,
    size_argument,
    weights_argument,
)
from .terminal import DEFAULT_MODEL, DTYPES, printable

STORAGE_DTYPES = ("bf16", "fp32", "fp8_scaled")
SOURCE = "pipeline folder, transformer folder, or a .safetensors or .bin file"
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


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line; `command` is the name of the command."""
    top = Parser(
        prog="unipic",
        description="Compose one to six pictures and a prompt into a new picture with UniPic 3.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"unipic {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="compose | info | convert | merge")
    _compose(commands.add_parser("compose", help="pictures and a prompt in, a picture out"))
    _info(commands.add_parser("info", help="describe a checkpoint, a LoRA or a model folder, without loading it"))
    _convert(
        commands.add_parser(
            "convert", help="write a transformer as one safetensors file that ComfyUI reads", description=CAUSAL_NOTE
        )
    )
    _merge(
        commands.add_parser(
            "merge", help="add LoRAs to a transformer's weights: one file, or a model folder", description=CAUSAL_NOTE
        )
    )
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return top


def _info(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", type=path_argument, help="folder or file")
    p.add_argument("--json", action="store_true", help="as JSON")


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("src", type=path_argument, help=SOURCE)
    p.add_argument("dst", type=path_argument, help="the file to write")
    p.add_argument("--dtype", type=dtype_argument, choices=STORAGE_DTYPES, default="bf16", help="default: %(default)s")
    p.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def _merge(p: argparse.ArgumentParser) -> None:
    p.add_argument("src", type=path_argument, help=SOURCE)
    p.add_argument(
        "dst",
        type=path_argument,
        help="a name that ends in .safetensors: one file for ComfyUI; any other: a folder for diffusers, with the text "
        "encoder and the other parts of SRC",
    )
    p.add_argument("--lora", type=lora_argument, action="append", required=True, metavar=LORA, help=REPEATABLE)
    p.add_argument(
        "--dtype", type=dtype_argument, choices=STORAGE_DTYPES, help="default: that of SRC; folders cannot be fp8"
    )
    p.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def _compose(p: argparse.ArgumentParser) -> None:
    p.description = "Pictures and a prompt in, a picture out. The prompt counts the pictures: image 1, image 2, ..."
    p.add_argument("images", nargs="*", type=path_argument, metavar="IMAGE", help="one to six pictures, in order")
    p.add_argument("--prompt", "-p", required=True, help="the picture to compose, in words")
    p.add_argument("--negative", default=" ", help="the prompt to lead away from, with --cfg above 1 (default: empty)")
    # as text, since argparse checks no other default
    p.add_argument("--out", "-o", type=output_argument, default="out.png", help="PNG, WebP or JPEG (%(default)s)")
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
    _references(p)
    _weights(p.add_argument_group("weights"))
    _sampling(p.add_argument_group("sampling (default: from the weights' recipe)"))
    _machine(p.add_argument_group("machine"))


def _references(p: argparse.ArgumentParser) -> None:
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


def _weights(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", type=path_argument, default=DEFAULT_MODEL, help="model folder (default: bundled unipic-nano)"
    )
    group.add_argument("--transformer", type=path_argument, help="folder or file of the network, in place of --model's")
    group.add_argument("--lora", type=lora_argument, action="append", default=[], metavar=LORA, help=REPEATABLE)


def _sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int, help="number of steps")
    group.add_argument("--cfg", type=float, help="guidance scale; 0 or 1 switches it off and halves the time")
    group.add_argument("--sampler", metavar="NAME", help="consistency, for few-step weights, or euler")
    group.add_argument("--reference-budget", type=int, metavar="PIXELS", help="side of the square all pictures share")
    group.add_argument(
        "--schedule",
        metavar="NAME",
        default="auto",
        help="times of the steps: auto (from the weights' recipe), base (the release's base weights, and its Euler "
        "demo of few-step ones), few_step, or fixed_shift (linear, shifted by --shift)",
    )
    group.add_argument("--shift", type=float, metavar="K", help="time shift of --schedule fixed_shift (default: 3)")


def _machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1 or cpu (default: %(default)s)")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    group.add_argument(
        "--attention",
        metavar="NAME",
        default="sdpa",
        help="sdpa (default), matmul, or, if their packages are installed, flash or sage; sage rounds to 8 bits",
    )
    group.add_argument("--compile", action="store_true", help="compile the network: minutes, then faster steps")
    group.add_argument(
        "--storage",
        metavar="NAME",
        default="auto",
        help="storage of the network's matrices: fp8 halves their memory, full = in --dtype; auto: fp8 if the file is "
        "in fp8",
    )
    group.add_argument(
        "--condition-cache",
        metavar="NAME",
        default="auto",
        help="cache of the references of causal weights: gpu, cpu (main memory), off (computed in every step); auto: "
        "the first of these that has room",
    )
    group.add_argument(
        "--cache-dtype",
        metavar="NAME",
        default="auto",
        help="numbers of that cache: auto = as computed; int8 = half the memory of bf16 with a small error",
    )
