"""Error of the consistency tangent by the precision of its matrix products, against float64.

Three networks: the golden one (tests/golden/tiny, random weights), the bundled nano on encoded scenes, and the MLP of
the toy whose ODE map is known. Precisions: float32, emulated TensorFloat-32 (operands of products rounded to 10 bits of
mantissa) and bfloat16 autocast. Errors are relative, |T - T64| / |T64|, the largest of all seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.paths import TINY
from tests.trainers.methods.mixture import draw, pretrained, two_conditions
from trainers.cache import load_image_vae
from trainers.config.run import DataConfig
from trainers.data.encoding import encode_pictures
from trainers.data.shards import Rows
from trainers.data.sources import Compositions
from trainers.data.text_embeddings import encode_rows
from trainers.methods.inputs import make_inputs
from trainers.methods.losses import TimedVelocity, difference_tangent, jvp_tangent
from trainers.methods.precision import tensor_float32
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.pipeline.text_encoder import TextEncoder
from unipic_core.run.plan import resolve
from unipic_core.sampling.flow import add_noise, velocity
from unipic_core.weights.recipe import recipe_of
from unipic_core.weights.transformer import load_transformer

from .common import RESULTS, changed_options, device_name, heading, line, machine, write_json

TIMES = (0.0, 0.002, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.998, 1.0)
E = 5e-3
BOUND = 0.05
"""Largest relative error at which emulated TensorFloat-32 is offered."""

PRECISIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32": nullcontext,
    "tf32": lambda: tensor_float32("cpu"),
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
}
COLUMNS = {"network": "<8", "tangent": "<11", "t": ">6.3f", **dict.fromkeys(PRECISIONS, ">9.1e"), "size": ">7.2f"}


@dataclass(frozen=True)
class Case:
    """A network with the inputs of one seed, in float32 and float64."""

    network: TimedVelocity
    exact: TimedVelocity
    x0: Tensor
    eps: Tensor


def bound(network: torch.nn.Module, latents: PackedLatents, text: TextCond, dtype: torch.dtype) -> TimedVelocity:
    """(x_t, t) -> v, with everything else in this dtype."""
    latents = PackedLatents(latents.tokens.to(dtype), latents.shapes, latents.num_target_tokens)
    text = TextCond(text.embeds.to(dtype))
    return lambda x_t, t: network(latents.with_target(x_t), t, text)


def case_of(networks: Sequence[torch.nn.Module], latents: PackedLatents, text: TextCond, seed: int) -> Case:
    eps = torch.randn(latents.target.shape, generator=torch.Generator().manual_seed(1000 + seed))
    first, second = (bound(n, latents, text, d) for n, d in zip(networks, (torch.float32, torch.float64), strict=True))
    return Case(first, second, latents.target, eps)


def both(folder: Path) -> list[torch.nn.Module]:
    return [load_transformer(folder, dtype=torch.float32), load_transformer(folder, dtype=torch.float32).double()]


def golden(seeds: int) -> Iterator[Case]:
    networks, shape = both(TINY), LatentShape(1, 8, 8)
    config: Any = networks[0].config
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randn(1, 128, config.in_channels, generator=g)
        text = TextCond(torch.randn(1, 12, config.joint_attention_dim, generator=g))
        yield case_of(networks, PackedLatents(tokens, ((shape, shape),), 64), text, seed)


def nano(seeds: int) -> Iterator[Case]:
    networks, vae = both(DEFAULT_MODEL), load_image_vae(DEFAULT_MODEL / "vae")
    made_for = resolve(recipe_of(DEFAULT_MODEL))
    encoder = TextEncoder.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    sizes = {"size": made_for.output_budget, "reference_budget": made_for.reference_budget}
    scenes = Compositions(DataConfig(folder="-", samples=1024, **sizes), 0, seeds, "heldout")
    for seed in range(seeds):
        row = scenes[seed]
        target, *references = (z[None].float() for z in encode_pictures(vae, [row.target, *row.references]))
        vision = tuple(torch.from_numpy(v.copy())[None] for v in row.vision)
        inputs = make_inputs(encode_rows(encoder, Rows(target, tuple(references), vision, (row.prompt,))))
        yield case_of(networks, inputs.latents, inputs.cond, seed)


def toy(seeds: int) -> Iterator[Case]:
    network, mixture = pretrained(), two_conditions()
    exact = pretrained.__wrapped__().double()  # the same again: training it is a function of its seed
    for seed in range(seeds):
        batch = draw(mixture, 64, torch.Generator().manual_seed(seed))
        yield Case(network.given(batch.cond), exact.given(batch.cond), batch.x0, batch.eps)


NETWORKS = {"golden": golden, "nano": nano, "toy": toy}


def tangent(kind: str, network: TimedVelocity, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    if kind == "jvp":
        return jvp_tangent(network, x_t, v, t)[1]
    return difference_tangent(network, x_t, v, t, E)


@torch.no_grad()
def errors(case: Case, kind: str, time: float) -> dict[str, float]:
    """Relative error of each precision, and the tangent's size in relation to the velocity's."""
    t = torch.full((len(case.x0),), time)
    x_t, v = add_noise(case.x0, case.eps, t), velocity(case.x0, case.eps)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = tangent(kind, case.exact, x_t.double(), v.double(), t.double())
        values = {"size": float(wanted.norm() / case.exact(x_t.double(), t.double()).norm())}
        for name, context in PRECISIONS.items():
            with context():
                values[name] = float((tangent(kind, case.network, x_t, v, t).double() - wanted).norm() / wanted.norm())
    return values


def measure(seeds: int) -> list[dict[str, Any]]:
    """The largest error of all seeds for each network, kind of tangent and time, printed as they come."""
    rows = []
    print(heading(COLUMNS))
    for name, make in NETWORKS.items():
        cases = list(make(seeds))
        for kind in ("difference", "jvp"):
            for time in TIMES:
                found = [errors(case, kind, time) for case in cases]
                row = {"network": name, "tangent": kind, "t": time}
                rows.append({**row, **{key: max(one[key] for one in found) for key in found[0]}})
                print(line(COLUMNS, rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(parser=parser)
    args = parser.parse_args(argv)
    rows = measure(args.seeds)
    largest = {name: max(row[name] for row in rows) for name in PRECISIONS}
    print(", ".join(f"{name}: at most {error:.1e}" for name, error in largest.items()))
    path = args.json or RESULTS / f"tangent-precision-{device_name()}{changed_options(args)}.json"
    write_json(path, {**machine(), "e": E, "seeds": args.seeds, "largest": largest, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
