"""`python -m tests.benchmarks.network [--json FILE]`: our MMDiT against diffusers' class, same weights, same inputs.

Both run in this process, in turns; the figure is the median of the ratios of neighbouring runs, which machine noise
moves least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from unipic_core.mmdit import MMDiT, MMDiTConfig
from unipic_core.sequence import LatentShape, PackedLatents, TextCond

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


def measure(case: Case, dtype: torch.dtype, backward: bool, rounds: int) -> Row:
    torch.manual_seed(0)
    theirs = QwenImageTransformer2DModel(**{k: v for k, v in case.config.to_dict().items() if not k.startswith("_")})
    ours = MMDiT(case.config)
    ours.load_state_dict(theirs.state_dict())
    for network in (theirs, ours):
        torch.nn.Module.to(network, dtype=dtype)  # diffusers' own warns about modules that it does not have
    shapes = tuple(LatentShape(1, s, s) for s in case.sides)
    tokens = torch.randn(case.batch, sum(s.num_tokens for s in shapes), case.config.in_channels, dtype=dtype)
    embeds = torch.randn(case.batch, case.text, case.config.joint_attention_dim, dtype=dtype)
    t = torch.rand(case.batch)
    packed = PackedLatents(tokens, (shapes,) * case.batch, shapes[0].num_tokens)
    img_shapes = [[(1, s.height, s.width) for s in shapes]] * case.batch

    def run_ours() -> torch.Tensor:
        return ours(packed, t, TextCond(embeds))

    def run_theirs() -> torch.Tensor:
        out = theirs(tokens, embeds, timestep=t.to(dtype), img_shapes=img_shapes, return_dict=False)[0]
        return out[:, : packed.num_target_tokens]

    with torch.no_grad():
        difference = float((run_ours() - run_theirs()).abs().max())
    pairs = [(timed(run_ours, backward), timed(run_theirs, backward)) for _ in range(rounds + 1)][1:]
    return Row(
        case.name,
        str(dtype).removeprefix("torch."),
        "forward and backward" if backward else "forward",
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
        difference,
    )


def timed(run: Callable[[], torch.Tensor], backward: bool) -> float:
    start = time.perf_counter()
    if backward:
        run().float().square().mean().backward()
    else:
        with torch.no_grad():
            run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    rows: list[Row] = []
    print(f"{'case':36} {'dtype':9} {'pass':21} {'ours':>9} {'diffusers':>9} {'ratio':>6}")
    for case, dtype, backward in itertools.product(CASES, (torch.float32, torch.bfloat16), (False, True)):
        row = measure(case, dtype, backward, args.rounds)
        rows.append(row)
        times = f"{row.ours_seconds * 1e3:7.1f}ms {row.diffusers_seconds * 1e3:7.1f}ms"
        print(f"{row.case:36} {row.dtype:9} {row.pass_:21} {times} {row.ratio:6.3f}", flush=True)
        if args.json:  # after every row: a long table may be cut short
            table = {"machine": machine, "torch": torch.__version__, "rows": [asdict(r) for r in rows]}
            args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
