"""`python -m tests.benchmarks.training [--json FILE]`: what a training step costs, and what is saved.

1. Memory of one base with adapters against a network per role: one update of fake score and student each, measured on
   the nano (a process each, beyond what it held before; Linux) and computed for the released sizes.
2. Tokens per second of a forward and backward pass, ours against diffusers' class: same weights, same inputs.
3. An epoch from the cache against one that encodes pictures and prompts on the way.
4. Samples with one to six references in one batch against one by one.
5. A step of each method (training_steps.py): full attention against the causal forms, adapters against copies.

Ratios are medians over neighbouring runs in one process, which machine noise moves least. Beside every figure stands
what arithmetic makes of it (`_arithmetic`; training_steps.py says how); the released sizes are arithmetic alone.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainers.cache import build, cached_samples, load_image_vae
from trainers.config import run as config
from trainers.config.run import AdapterConfig, DataConfig, NetworkConfig, load_config, parse_run
from trainers.data.text_embeddings import encoder_fingerprint
from trainers.methods.inputs import Inputs, make_inputs, padded_batch
from trainers.optimizers.by_name import make_optimizers
from trainers.roles.load import load_roles
from trainers.roles.types import FAKE_SCORE, STUDENT, TEACHER, Roles
from trainers.tools.memory import GIB, estimate, four_copies
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.model.config import FULL
from unipic_core.pipeline.text_encoder import TextEncoder

from .arithmetic import count_flops
from .common import (
    Columns,
    Run,
    draw,
    draw_bars,
    heading,
    line,
    machine,
    make_parser,
    peak_of_its_own,
    result_file,
    write_json,
)
from .network import CASES, Case, measure
from .network import TINY as TINY_CASES
from .systems import rated
from .training_steps import (
    KIND,
    METHODS,
    PRODUCT_SIDE,
    ROLES,
    Variant,
    bytes_by_arithmetic,
    import_optimizers,
    step_rows,
)

SIDES = ((6, 6), (4, 6), (6, 4), (4, 4), (6, 2), (2, 6), (4, 2), (2, 4))
"""Latent tokens of references of the nano."""


@dataclass(frozen=True)
class Setup:
    """cases: of `against_diffusers`. samples: of an epoch. methods: of `step_rows`."""

    cases: Sequence[Case]
    samples: int
    methods: Sequence[str]


FULL_SIZE = Setup(CASES, 96, METHODS)
TINY = Setup(TINY_CASES, 8, METHODS[:1])


def compared(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Of two runs: median seconds of each, and the median of the ratios first / second."""
    flops = {name: count_flops(run) for name, run in runs.items()}  # also the round before those that count
    times, per_second = rated(runs, KIND, PRODUCT_SIDE, rounds, warmup=0)
    made: dict[str, float] = {}
    for name in runs:
        made[f"{name}_seconds"] = times.median(name)
        made[f"{name}_seconds_arithmetic"] = flops[name] / per_second
    first, second = runs
    return {**made, "ratio": times.ratio(first, second), "ratio_arithmetic": flops[first] / flops[second]}


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
    for name in ROLES:
        made[f"nano_{name}_bytes"] = peak_of_its_own(loaded_and_updated, name == "adapters")
        one_sample = replace(Variant("dmd", FULL, name).config("x"), batch_size=1)
        made[f"nano_{name}_bytes_arithmetic"] = bytes_by_arithmetic(one_sample)
    for end in ("", "_arithmetic"):
        made[f"nano_ratio{end}"] = made[f"nano_adapters_bytes{end}"] / made[f"nano_copies_bytes{end}"]
    run = load_config(Path(config.__file__).parents[1] / "configs" / "unipic3-dmd-80gb.yaml")
    adapters, copies = estimate(run).gpu / GIB, four_copies(run).gpu / GIB
    of_gib = {"released_adapters_gib_arithmetic": adapters, "released_copies_gib_arithmetic": copies}
    return {**made, **of_gib, "released_ratio_arithmetic": adapters / copies}


# --- time -------------------------------------------------------------------------------------------------------------


def against_diffusers(rounds: int, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Tokens per second of each, and ours over diffusers'."""
    for case in cases:
        row = measure(case, torch.float32, "forward and backward", rounds)
        tokens = case.batch * case.load.total
        yield {
            "case": case.name,
            "ours_tokens": tokens / row.ours_seconds,
            "ours_tokens_arithmetic": tokens / row.ours_floor,
            "diffusers_tokens": tokens / row.diffusers_seconds,
            "diffusers_tokens_arithmetic": tokens / row.diffusers_floor,
            "ratio": 1 / row.ratio,
            "ratio_arithmetic": 1 / row.ratio_floor,
        }


def cached_epochs(rounds: int, samples: int) -> dict[str, float]:
    """One epoch of the nano's composition set in batches of 8, under adapters of the base."""
    vae = load_image_vae(DEFAULT_MODEL / "vae")
    text = TextEncoder.from_pretrained(DEFAULT_MODEL, torch.float32, torch.device("cpu"))
    roles, name = nano_roles(True), encoder_fingerprint(text)
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(f"{folder}/0", samples=samples, samples_per_shard=samples, workers=0)
        build(data, vae, text)
        made = itertools.count(1)

        def cached() -> None:
            (samples,) = cached_samples(data, name)
            for at in range(0, len(samples), 8):  # rows of equal shapes lie side by side
                batch = [make_inputs(samples.take(row)) for row in range(at, min(at + 8, len(samples)))]
                update(roles, STUDENT, padded_batch(batch))

        def encoding() -> None:
            build(replace(data, folder=f"{folder}/{next(made)}"), vae, text)
            cached()

        return compared({"cached": cached, "encoding": encoding}, rounds)


def mixed_references(rounds: int) -> dict[str, float]:
    """Eight samples with one to six references: padded and masked in one batch, against one at a time."""
    counts = (1, 2, 3, 4, 5, 6, 2, 3)
    roles, whole, singles = nano_roles(True), example(counts), [example((n,)) for n in counts]

    def one_by_one() -> None:
        for single in singles:
            update(roles, STUDENT, single)

    made = compared({"batch": lambda: update(roles, STUDENT, whole), "one_by_one": one_by_one}, rounds)
    real = sum(sum(s.num_tokens for s in shapes) for shapes in whole.latents.shapes)
    padded = len(counts) * whole.latents.tokens.shape[1]
    return {**made, "padding": 1 - real / padded}


# --- what comes out ---------------------------------------------------------------------------------------------------

PANELS = {
    "tokens_per_second": "tokens per second of a step",
    "time_ratio": "time of a step over the first's",
    "peak_mib": "peak memory of a step, MiB",
}
"""Figure of a step -> title."""


def columns_of(row: Mapping[str, Any]) -> Columns:
    """A table's, from its first row."""
    return {key: "<34" if isinstance(value, str) else f">{max(len(key), 9)}.4g" for key, value in row.items()}


def pair_of(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    """A figure, and what arithmetic makes of it."""
    return row[key], row[f"{key}_arithmetic"]


def ratios_of(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What the trainers have over what they could have instead, by name."""
    named = {
        "memory: adapters\nover copies": pair_of(result["memory"], "nano_ratio"),
        "epoch: cached\nover encoding": pair_of(result["cached_against_encoding"], "ratio"),
        "mixed batch\nover one by one": pair_of(result["mixed_batch_against_one_by_one"], "ratio"),
    }
    speeds = {f"tokens/s over diffusers'\n{r['case']}": pair_of(r, "ratio") for r in result["against_diffusers"]}
    return {**named, **speeds}


def plot(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    draw_bars(axes[0], ratios_of(result))
    for axis, key in zip(axes[1:], PANELS, strict=True):
        draw_bars(axis, {f"{r['method']}, {r['form']}, {r['roles']}": pair_of(r, key) for r in result["steps"]})


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(__doc__, rounds=15).parse_args(argv)
    setup, path, fewer = TINY if args.tiny else FULL_SIZE, result_file(args, "training"), -(-args.rounds // 3)
    result: dict[str, Any] = {"machine": machine()}

    def done(name: str, found: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        single = isinstance(found, Mapping)
        rows: list[Mapping[str, Any]] = []
        for row in [found] if single else found:
            columns = columns_of(row)
            print(*([] if rows else [f"\n{name}", heading(columns)]), line(columns, row), sep="\n", flush=True)
            rows.append(row)
            result[name] = row if single else rows
            write_json(path, result)  # after every row: a long run may be cut short

    done("memory", memory())
    done("against_diffusers", against_diffusers(args.rounds, setup.cases))
    done("cached_against_encoding", cached_epochs(fewer, setup.samples))
    done("mixed_batch_against_one_by_one", mixed_references(args.rounds))
    done("steps", step_rows(fewer, setup.methods))
    draw(path, ["ratios", *PANELS.values()], partial(plot, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
