"""`python -m tests.benchmarks.network [--json FILE]`: our MMDiT against diffusers' class, same weights, same inputs.

Both run in this process, in turns; the figure is the median of the ratios of neighbouring runs, which machine noise
moves least.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from unipic_core.mmdit import MMDiT, MMDiTConfig
from unipic_core.segments import FULL

from .arithmetic import Load
from .common import Columns, heading, in_turns, line, machine, write_json
from .systems import TIME, Inputs, Kind, square

NANO = MMDiTConfig(
    num_layers=6, num_attention_heads=5, attention_head_dim=32, joint_attention_dim=128, axes_dims_rope=(8, 12, 12)
)
WIDE = MMDiTConfig(num_layers=2, num_attention_heads=12, joint_attention_dim=512)


@dataclass(frozen=True)
class Case:
    name: str
    config: MMDiTConfig
    sides: tuple[int, ...]
    """Tokens per side of the target and of each reference."""
    text: int
    batch: int = 1


CASES = (
    Case("nano, 3 references", NANO, (8, 6, 6, 6), 70),
    Case("nano, 3 references, batch 8", NANO, (8, 6, 6, 6), 70, 8),
    Case("width 1536, 2 layers, 1 reference", WIDE, (32, 32), 320),
    Case("width 1536, 2 layers, 6 references", WIDE, (32, 12, 12, 12, 12, 12, 12), 320),
)


@dataclass(frozen=True)
class Row:
    case: str
    dtype: str
    pass_: str
    ours_seconds: float
    diffusers_seconds: float
    ratio: float
    """Ours over diffusers': below 1 is faster."""
    max_difference: float


COLUMNS: Columns = {
    "case": "<36",
    "dtype": "<9",
    "pass_": "<21",
    "ours_seconds": ">12.4f",
    "diffusers_seconds": ">17.4f",
    "ratio": ">6.3f",
}


def diffusers_network(ours: MMDiT) -> Any:
    """diffusers' class, which has the full form alone, on the same memory."""
    sizes = ours.config.with_form(FULL).to_dict()
    theirs = QwenImageTransformer2DModel(**{k: v for k, v in sizes.items() if not k.startswith("_")})
    nn.Module.to(theirs, dtype=ours.dtype)  # diffusers' own warns about modules that it does not have
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs


def evaluate_diffusers(theirs: Any, inputs: Inputs) -> Tensor:
    """The target's velocity by diffusers' class."""
    latents, text = inputs
    shapes = [[(s.frames, s.height, s.width) for s in sample] for sample in latents.shapes]
    t = torch.full((len(shapes),), TIME, dtype=text.embeds.dtype)
    out = theirs(latents.tokens, text.embeds, timestep=t, img_shapes=shapes, return_dict=False)[0]
    return out[:, : latents.num_target_tokens]


def measure(case: Case, dtype: torch.dtype, backward: bool, rounds: int) -> Row:
    torch.manual_seed(0)
    kind = Kind(dtype)
    ours = kind.random(case.config).requires_grad_(True)
    theirs = diffusers_network(ours)
    target, *references = map(square, case.sides)
    inputs = kind.inputs(case.config, Load(target, tuple(references), case.text, case.batch))

    def run_ours() -> Tensor:
        return ours(inputs[0], TIME, inputs[1])

    def run_theirs() -> Tensor:
        return evaluate_diffusers(theirs, inputs)

    def passed(run: Any) -> None:
        with torch.set_grad_enabled(backward):
            out = run()
        if backward:
            out.float().square().mean().backward()

    with torch.no_grad():
        difference = float((run_ours() - run_theirs()).abs().max())
    times = in_turns({"ours": lambda: passed(run_ours), "diffusers": lambda: passed(run_theirs)}, rounds)
    return Row(
        case.name,
        str(dtype).removeprefix("torch."),
        "forward and backward" if backward else "forward",
        times.median("ours"),
        times.median("diffusers"),
        times.ratio("ours", "diffusers"),
        difference,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(heading(COLUMNS))
    for case, dtype, backward in itertools.product(CASES, (torch.float32, torch.bfloat16), (False, True)):
        rows.append(asdict(measure(case, dtype, backward, args.rounds)))
        print(line(COLUMNS, rows[-1]), flush=True)
        write_json(args.json, {"machine": machine(), "rows": rows})  # after every row: a long table may be cut short


if __name__ == "__main__":
    main()
