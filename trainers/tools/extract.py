"""`python -m trainers.extract BASE TUNED --rank 56 --out FILE.safetensors`: a LoRA of what full training changed.

Of each layer's difference the best matrix of that rank, by its singular values. A form that a LoRA does not learn by
itself, as a causal one, is trained fully, extracted, and trained on as a LoRA (`network.student: FILE`).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from unipic_core.errors import UniPicError
from unipic_core.weights.convert import protect_sources, source_recipe
from unipic_core.weights.files import Weights
from unipic_core.weights.lora import save_lora
from unipic_core.weights.transformer import check_keys, open_transformer

from ..config.run import TARGETS, AdapterConfig
from ..roles.roles import targets_of
from ..terminal import exit_code


@dataclass(frozen=True)
class Extracted:
    """layers: name -> (down [r, in], up [out, r]). kept: the share of the squared difference of all weights that they
    hold; `in_layers`: the share that lies in these layers at all, the rest being in norms, biases and other layers."""

    layers: dict[str, tuple[Tensor, Tensor]]
    kept: float
    in_layers: float


def best_of_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [r, in] of orthonormal rows and up [out, r] whose product is nearest to `difference` [out, in] (Eckart and
    Young 1936). By the eigenvectors of the smaller Gram matrix, which for the 20B network's layers is 3072 wide."""
    if difference.shape[1] <= difference.shape[0]:
        _, vectors = torch.linalg.eigh(difference.T @ difference)  # ascending
        down = vectors[:, -rank:].T
        return down, difference @ down.T
    _, vectors = torch.linalg.eigh(difference @ difference.T)
    up = vectors[:, -rank:]
    down, triangle = torch.linalg.qr((up.T @ difference).T)  # the orthonormal rows belong in `down` here too
    return down.T, up @ triangle.T


def extract(
    base: Path,
    tuned: Path,
    rank: int,
    targets: Sequence[str] = AdapterConfig.targets,
    device: str = "cpu",
    progress: bool = False,
) -> Extracted:
    """The LoRA between two checkpoints of one architecture, one layer in memory at a time, in float32.

    targets: its layers, as `adapter.targets`. Raises CheckpointError for what cannot be read, and
    UniPicError for checkpoints of different shapes, for equal ones, and where no layer is named so or one is too small.
    """
    before, after = open_transformer(base).weights, open_transformer(tuned).weights
    report = check_keys(before.shapes(), after.shapes())
    if not report.fits:
        raise UniPicError(f"{base} and {tuned} are of different shapes ({report}); expected one trained from the other")
    pattern = re.compile(targets_of(AdapterConfig(targets=tuple(targets))) + r"\.weight")
    named = {name for name in before if pattern.fullmatch(name)}
    if not named:
        raise UniPicError(f"no layer of {base} ends in one of {', '.join(targets)}")
    small = next((name for name in sorted(named) if min(before.shape(name)) < rank), None)
    if small or rank < 1:
        limit = f"; {small} is {list(before.shape(small))}" if small else ""
        raise UniPicError(f"the rank must be at least 1 and at most the side of every layer, got {rank}{limit}")
    layers, kept, inside, total = {}, 0.0, 0.0, 0.0
    for name in tqdm(before, "extract", disable=not progress):
        difference = _difference(before, after, name, device)
        energy = float(difference.square().sum(dtype=torch.float64))
        total += energy
        if name in named:
            down, up = best_of_rank(difference, rank)
            inside += energy
            kept += float(up.square().sum(dtype=torch.float64))  # the rows of down are orthonormal
            layers[name.removesuffix(".weight")] = (down.cpu().contiguous(), up.cpu().contiguous())
    if not inside:
        raise UniPicError(f"{base} and {tuned} hold the same weights in these layers; expected one trained further")
    return Extracted(layers, kept / total, inside / total)


def _difference(before: Weights, after: Weights, name: str, device: str) -> Tensor:
    return after.get(name).to(device, torch.float32) - before.get(name).to(device, torch.float32)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="trainers.extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("base", type=Path, help="what the training started from")
    top.add_argument("tuned", type=Path, help="what it made: a folder or a file")
    top.add_argument("--rank", type=int, default=AdapterConfig.rank, help="%(default)s")
    top.add_argument(
        "--target",
        action="append",
        help=f"{', '.join(TARGETS)}, or the end of layers' names; may be repeated (attention and mlp)",
    )
    top.add_argument("--device", default="cpu", help="where to compute (%(default)s)")
    top.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    return top


def run(args: argparse.Namespace) -> None:
    """Everything but the exit code. Raises UniPicError in one sentence for bad input."""
    if args.out.suffix != ".safetensors":
        raise UniPicError(f"--out should end in .safetensors, got {args.out.name}")
    protect_sources(args.out, [args.base, args.tuned])
    found = extract(args.base, args.tuned, args.rank, args.target or AdapterConfig.targets, args.device, progress=True)
    recipe = source_recipe(args.tuned)
    how = {"tuned": args.tuned.resolve().name, "rank": args.rank, "kept": round(found.kept, 4)}
    save_lora(args.out, found.layers, recipe=replace(recipe, made={**recipe.made, "extract": how}))
    print(
        f"{args.out}: {len(found.layers)} layers of rank {args.rank} hold {found.kept:.1%} of the squared difference "
        f"({found.in_layers:.1%} of it is in these layers)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
