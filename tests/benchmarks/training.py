"""`python -m tests.benchmarks.training [--quick] [--json FILE]`: what a training step costs, and what is saved.

1. Memory of one base with adapters against a network per role: one update of fake score and student each, measured on
   the nano (a process each, beyond what it held before; Linux) and computed for the released sizes.
2. Tokens per second of a forward and backward pass, ours against diffusers' class: same weights, same inputs.
3. An epoch from the cache against one that encodes pictures and prompts on the way.
4. Samples with one to six references in one batch against one by one.
5. A step of each method (training_steps.py): full attention against the causal forms, adapters against copies.

Ratios are medians over neighbouring runs in one process, which machine noise moves least.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainers.cache import build, load_image_vae, read_cache
from trainers.config import AdapterConfig, DataConfig, NetworkConfig, RunConfig, parse_run
from trainers.memory import GIB, estimate, four_copies
from trainers.networks import load_roles
from trainers.optimizers import make_optimizers
from trainers.roles import FAKE_SCORE, STUDENT, TEACHER, Roles
from trainers.text_cache import encoder_fingerprint
from trainers.training import Inputs, make_inputs
from unipic_core.cli import DEFAULT_MODEL
from unipic_core.pipeline.text import TextEncoder
from unipic_core.sequence import LatentShape, TextCond, pack_with_references

from .common import Run, in_turns, machine, peak_of_its_own, write_json
from .network import CASES, measure
from .training_steps import import_optimizers, step_rows

SIDES = ((6, 6), (4, 6), (6, 4), (4, 4), (6, 2), (2, 6), (4, 2), (2, 4))
"""Latent tokens of references of the nano."""


def compared(first: Run, second: Run, rounds: int) -> dict[str, float]:
    """Median seconds of each, and the median of the ratios first / second."""
    times = in_turns({"first": first, "second": second}, rounds)
    seconds = {f"{name}_seconds": times.median(name) for name in times.seconds}
    return {**seconds, "ratio": times.ratio("first", "second")}


# --- memory -----------------------------------------------------------------------------------------------------------


def nano_roles(adapters: bool) -> Roles:
    adapter = AdapterConfig(rank=32) if adapters else None
    network = NetworkConfig(str(DEFAULT_MODEL), adapter=adapter)
    return load_roles(network, (STUDENT, FAKE_SCORE), (TEACHER,), seed=0)


def example(counts: tuple[int, ...], seed: int = 0) -> Inputs:
    """A batch of nano samples, one for each number of references."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randn(len(counts), 64, 64, generator=g)
    references = [[torch.randn(16, 1, 2 * h, 2 * w, generator=g) for h, w in SIDES[:n]] for n in counts]
    packed = pack_with_references(x0, LatentShape(1, 8, 8), references)
    text = TextCond(torch.randn(len(counts), 70, 128, generator=g))
    return Inputs(x0, packed, text, text)


def update(roles: Roles, role: str, batch: Inputs) -> None:
    """Forward, backward, and the optimizer; its states stay with the roles."""
    kept = vars(roles).setdefault("_benchmark_optimizers", {})
    if role not in kept:
        kept[role] = make_optimizers(roles.trained(role), parse_optimizer())
    roles(role, batch.latents, 0.5, batch.cond).square().mean().backward()
    for optimizer in kept[role]:
        optimizer.step()
        optimizer.zero_grad()


def parse_optimizer() -> Any:
    return parse_run({"method": "vae", "output": "x"}).optimizer


def loaded_and_updated(adapters: bool) -> Run:
    """For a process of its own: load the roles, and update each part once."""
    torch.set_num_threads(1)
    batch = example((3,))
    import_optimizers()

    def run() -> None:
        roles = nano_roles(adapters)
        for role in (FAKE_SCORE, STUDENT):
            update(roles, role, batch)
            with torch.no_grad():
                roles(TEACHER, batch.latents, 0.5, batch.cond)

    return run


def memory() -> dict[str, float]:
    made: dict[str, float] = {}
    for name in ("adapters", "copies"):
        made[f"nano_{name}_bytes"] = peak_of_its_own(loaded_and_updated, name == "adapters")
    run = released()
    made |= {"released_adapters_gib": estimate(run).gpu / GIB, "released_copies_gib": four_copies(run).gpu / GIB}
    made["nano_ratio"] = made["nano_adapters_bytes"] / made["nano_copies_bytes"]
    made["released_ratio"] = made["released_adapters_gib"] / made["released_copies_gib"]
    return made


def released() -> RunConfig:
    """Distribution matching of the released weights, as in configs/unipic3-dmd-80gb.yaml."""
    data = {"folder": "x", "kind": "jsonl", "path": "x", "size": 1024, "reference_budget": 1024}
    adapter = {"rank": 64, "alpha": 64.0}
    network = {"model": "released", "weights": "bf16", "gradient_checkpointing": True, "adapter": adapter}
    values = {"method": "dmd", "output": "x", "batch_size": 1, "precision": "bf16"}
    return parse_run({**values, "network": network, "data": data})


# --- time -------------------------------------------------------------------------------------------------------------


def against_diffusers(rounds: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for case in CASES[:2] if quick else CASES:
        row = measure(case, torch.float32, True, rounds)
        tokens = case.batch * (sum(s * s for s in case.sides) + case.text)
        speeds = {"ours_tokens": tokens / row.ours_seconds, "diffusers_tokens": tokens / row.diffusers_seconds}
        rows.append({"case": case.name, **speeds, "ratio": 1 / row.ratio})
    return rows


def cached_epochs(rounds: int, samples: int) -> dict[str, float]:
    """One epoch of the nano's composition set in batches of 8, under adapters of the base."""
    vae = load_image_vae(DEFAULT_MODEL / "vae")
    text = TextEncoder.from_pretrained(DEFAULT_MODEL, torch.float32, torch.device("cpu"))
    roles, name = nano_roles(True), encoder_fingerprint(text)
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(f"{folder}/0", samples=samples, samples_per_shard=samples, workers=0)
        build(data, vae, text)
        made = iter(range(1, rounds + 2))

        def cached() -> None:
            for bucket in read_cache(data, name).values():
                for at in range(0, len(bucket), 8):
                    update(roles, STUDENT, make_inputs(bucket.take(torch.arange(at, min(at + 8, len(bucket))).numpy())))

        def encoding() -> None:
            build(replace(data, folder=f"{folder}/{next(made)}"), vae, text)
            cached()

        return compared(cached, encoding, rounds)


def mixed_references(rounds: int) -> dict[str, float]:
    """Eight samples with one to six references: padded and masked in one batch, against one at a time."""
    counts = (1, 2, 3, 4, 5, 6, 2, 3)
    roles, whole, singles = nano_roles(True), example(counts), [example((n,)) for n in counts]

    def one_by_one() -> None:
        for single in singles:
            update(roles, STUDENT, single)

    made = compared(lambda: update(roles, STUDENT, whole), one_by_one, rounds)
    real = sum(sum(s.num_tokens for s in shapes) for shapes in whole.latents.shapes)
    padded = len(counts) * whole.latents.tokens.shape[1]
    return {**made, "padding": 1 - real / padded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and only the nano's cases")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds = 7 if args.quick else 15
    result: dict[str, Any] = {"machine": machine()}

    def done(name: str, found: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        single = isinstance(found, Mapping)
        rows: list[Mapping[str, Any]] = []
        for row in [found] if single else found:
            print(name, *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), sep="  ")
            rows.append(row)
            result[name] = row if single else rows
            write_json(args.json, result)  # after every row: a long run may be cut short

    done("memory", memory())
    done("against_diffusers", against_diffusers(rounds, args.quick))
    done("cached_against_encoding", cached_epochs(1 if args.quick else 3, 24 if args.quick else 96))
    done("mixed_batch_against_one_by_one", mixed_references(rounds))
    done("steps", step_rows(1 if args.quick else 5))


if __name__ == "__main__":
    main()
