"""`python -m tests.benchmarks.network [--json FILE]`: our MMDiT against diffusers' class, same weights, same inputs.

Both run in this process, in turns; the figure is the median of the ratios of neighbouring runs, which machine noise
moves least. A floor is what arithmetic asks for: operations at the rate of a large matrix product of the same type,
timed in the same rounds; of the ratio, operations over operations.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from unipic_core.model.config import FULL, MMDiTConfig
from unipic_core.model.mmdit import MMDiT

from .arithmetic import Load, step_flops, whole_flops
from .common import Columns, draw, draw_bars, heading, line, machine, make_parser, result_file, write_json
from .systems import DTYPES, TIME, TINY_SIZES, Inputs, Kind, rated, square

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

    @property
    def load(self) -> Load:
        target, *references = map(square, self.sides)
        return Load(target, tuple(references), self.text, self.batch)


CASES = (
    Case("nano, 3 references", NANO, (8, 6, 6, 6), 70),
    Case("nano, 3 references, batch 8", NANO, (8, 6, 6, 6), 70, 8),
    Case("width 1536, 2 layers, 1 reference", WIDE, (32, 32), 320),
    Case("width 1536, 2 layers, 6 references", WIDE, (32, 12, 12, 12, 12, 12, 12), 320),
)
TINY = (Case("toy", TINY_SIZES, (4, 3), 8),)

PRODUCT_SIDE = 2048
PASSES = {"forward": 1, "forward and backward": 3}
"""Name -> how many forward passes it costs by arithmetic: a product has two gradients, each as dear as itself."""


@dataclass(frozen=True)
class Row:
    case: str
    dtype: str
    pass_: str
    ours_seconds: float
    ours_floor: float
    diffusers_seconds: float
    diffusers_floor: float
    ratio: float
    """Ours over diffusers': below 1 is faster."""
    ratio_floor: float
    max_difference: float


COLUMNS: Columns = {
    "case": "<36",
    "dtype": "<9",
    "pass_": "<21",
    "ours_seconds": ">12.4f",
    "ours_floor": ">10.4f",
    "diffusers_seconds": ">17.4f",
    "diffusers_floor": ">15.4f",
    "ratio": ">6.3f",
    "ratio_floor": ">11.3f",
    "max_difference": ">14.1e",
}


def diffusers_network(ours: MMDiT) -> Any:
    """diffusers' class, which has the full form alone, on the same memory."""
    sizes = ours.config.with_attention_form(FULL).to_dict()
    with init_empty_weights():  # weights of its own, never used, would count in a peak of memory
        theirs = QwenImageTransformer2DModel.from_config(sizes)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs


def evaluate_diffusers(theirs: Any, inputs: Inputs) -> Tensor:
    """The target's velocity by diffusers' class."""
    latents, text = inputs
    shapes = [[(s.frames, s.height, s.width) for s in sample] for sample in latents.shapes]
    t = torch.full((len(shapes),), TIME, dtype=text.embeds.dtype)
    out = theirs(latents.tokens, text.embeds, timestep=t, img_shapes=shapes, return_dict=False)[0]
    return out[:, : latents.num_target_tokens]


def measure(case: Case, dtype: torch.dtype, pass_: str, rounds: int) -> Row:
    torch.manual_seed(0)
    kind, backward = Kind(dtype), pass_ != "forward"
    ours = kind.random(case.config).requires_grad_(True)
    theirs = diffusers_network(ours)
    inputs = kind.inputs(case.config, case.load)

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
    runs = {"ours": lambda: passed(run_ours), "diffusers": lambda: passed(run_theirs)}
    times, per_second = rated(runs, kind, PRODUCT_SIDE, rounds)
    own, whole = (PASSES[pass_] * flops(case.config, case.load) for flops in (step_flops, whole_flops))
    return Row(
        case.name,
        str(dtype).removeprefix("torch."),
        pass_,
        times.median("ours"),
        own / per_second,
        times.median("diffusers"),
        whole / per_second,
        times.ratio("ours", "diffusers"),
        own / whole,
        difference,
    )


def plot(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    for axis, pass_ in zip(axes, PASSES, strict=True):
        mine = [row for row in rows if row["pass_"] == pass_]
        draw_bars(axis, {f"{row['case']}\n{row['dtype']}": (row["ratio"], row["ratio_floor"]) for row in mine})


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(__doc__, rounds=15).parse_args(argv)
    path, rows = result_file(args, "network"), list[dict[str, Any]]()
    print(heading(COLUMNS))
    for case, dtype, pass_ in itertools.product(TINY if args.tiny else CASES, DTYPES.values(), PASSES):
        rows.append(asdict(measure(case, dtype, pass_, args.rounds)))
        print(line(COLUMNS, rows[-1]), flush=True)
        write_json(path, {"machine": machine(), "rows": rows})  # after every row: a long table may be cut short
    draw(path, [f"{pass_}: time over diffusers'" for pass_ in PASSES], partial(plot, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
