"""`python -m trainers.extract BASE TUNED --rank 56 --out FILE.safetensors`: extract a LoRA from full training.

Each layer's difference is approximated by the best matrix of that rank (truncated singular value decomposition). An
attention form that a LoRA learns slowly is trained fully, extracted, and trained further as a LoRA
(`network.student: FILE`).
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
from ..roles.adapters import targets_of
from ..terminal import exit_code


@dataclass(frozen=True)
class Extracted:
    """Extracted LoRA. layers: name -> (down [r, in], up [out, r]).

    share: part of the squared difference of all weights that the LoRA holds; share_in_layers: part that is in these
    layers, the rest being in norms, biases and other layers.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    share: float
    share_in_layers: float


def best_of_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation up @ down of `difference` [out, in]: down [r, in] with orthonormal rows, up [out, r].

    Eckart and Young 1936, by the eigenvectors of the smaller Gram matrix (3072 wide for the 20B network's layers).
    """
    if difference.shape[1] <= difference.shape[0]:
        _, vectors = torch.linalg.eigh(difference.T @ difference)  # ascending
        down = vectors[:, -rank:].T
        return down, difference @ down.T
    _, vectors = torch.linalg.eigh(difference @ difference.T)
    up = vectors[:, -rank:]
    down, triangle = torch.linalg.qr((up.T @ difference).T)  # orthonormal rows in `down` here too
    return down.T, up @ triangle.T


def extract(
    base: Path,
    tuned: Path,
    rank: int,
    targets: Sequence[str] = AdapterConfig.targets,
    device: str = "cpu",
    progress: bool = False,
) -> Extracted:
    """Extract the LoRA between two checkpoints of one architecture, in float32, one layer in memory at a time.

    targets: as `adapter.targets`. Raises CheckpointError for unreadable checkpoints and UniPicError for different
    shapes, equal weights, targets that match no layer, and a rank above a layer's width.
    """
    before, after = open_transformer(base).weights, open_transformer(tuned).weights
    report = check_keys(before.shapes(), after.shapes())
    if not report.fits:
        raise UniPicError(f"{base} and {tuned} are of different shapes ({report}); expected one trained from the other")
    pattern = re.compile(targets_of(AdapterConfig(targets=tuple(targets))) + r"\.weight")
    named = {name for name in before if pattern.fullmatch(name)}
    if not named:
        raise UniPicError(f"--target: expected suffixes of layer names of {base}, got {', '.join(targets)}")
    small = next((name for name in sorted(named) if min(before.shape(name)) < rank), None)
    if small or rank < 1:
        limit = f"; {small} is {list(before.shape(small))}" if small else ""
        raise UniPicError(f"--rank must be at least 1 and at most the width of every layer, got {rank}{limit}")
    layers, held, inside, total = {}, 0.0, 0.0, 0.0
    for name in tqdm(before, "extract", disable=not progress):
        difference = _difference(before, after, name, device)
        energy = float(difference.square().sum(dtype=torch.float64))
        total += energy
        if name in named:
            down, up = best_of_rank(difference, rank)
            inside += energy
            held += float(up.square().sum(dtype=torch.float64))  # the rows of down are orthonormal
            layers[name.removesuffix(".weight")] = (down.cpu().contiguous(), up.cpu().contiguous())
    if not inside:
        raise UniPicError(
            f"{base} and {tuned} have equal weights in these layers; expected TUNED to be trained from BASE"
        )
    return Extracted(layers, held / total, inside / total)


def _difference(before: Weights, after: Weights, name: str, device: str) -> Tensor:
    return after.get(name).to(device, torch.float32) - before.get(name).to(device, torch.float32)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="trainers.extract", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("base", type=Path, help="checkpoint that the training started from")
    top.add_argument("tuned", type=Path, help="trained checkpoint: a folder or a file")
    top.add_argument("--rank", type=int, default=AdapterConfig.rank, help="of the LoRA (%(default)s)")
    top.add_argument(
        "--target",
        action="append",
        help=f"{', '.join(TARGETS)}, or the suffix of layer names; repeatable (default: attention and mlp)",
    )
    top.add_argument("--device", default="cpu", help="device of the computation (%(default)s)")
    top.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    return top


def run(args: argparse.Namespace) -> None:
    """Extract and save the LoRA. Raises UniPicError in one sentence for bad input."""
    if args.out.suffix != ".safetensors":
        raise UniPicError(f"--out must end in .safetensors, got {args.out.name}")
    protect_sources(args.out, [args.base, args.tuned])
    lora = extract(args.base, args.tuned, args.rank, args.target or AdapterConfig.targets, args.device, progress=True)
    recipe = source_recipe(args.tuned)
    provenance = {"tuned": args.tuned.resolve().name, "rank": args.rank, "kept": round(lora.share, 4)}
    save_lora(args.out, lora.layers, recipe=replace(recipe, made={**recipe.made, "extract": provenance}))
    print(
        f"{args.out}: {len(lora.layers)} layers of rank {args.rank} hold {lora.share:.1%} of the squared difference "
        f"({lora.share_in_layers:.1%} of it is in these layers)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
