"""`python -m tests.benchmarks.peers [--json FILE]`: a picture by our network, by the release's and by EditPlus' way.

The network alone, with the same random weights everywhere; filling the condition cache counts. References' tokens:

    unipic         ours, full attention; all references together as many tokens as the target
    unipic-cached  ours in a causal form, what is fixed computed once per picture
    release        diffusers' class, references as above
    editplus       diffusers' class, every reference as many tokens as the target

Text is 64 tokens and one per four reference tokens, for EditPlus too (its vision input of 384^2 would be 196 tokens a
reference, here they are 256). Every round is one step of each system, in turns, and as many rounds as a picture has
steps make one picture of each; what is longer is multiplied, and says so. Peak memory is what building a system and
evaluating it once adds to a process of its own, weights included. A floor is what arithmetic asks for: operations at
the rate of a large matrix product, timed in the same rounds; and the memory of weights and cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT

from .arithmetic import Load, cache_bytes, fill_flops, step_flops, whole_flops
from .common import (
    MIB,
    Bar,
    Columns,
    Run,
    Times,
    draw,
    heading,
    in_turns,
    judge,
    line,
    machine,
    make_parser,
    peak_of_its_own,
    result_file,
    write_json,
)
from .network import diffusers_network, evaluate_diffusers
from .systems import (
    CAUSAL,
    DTYPES,
    PRODUCT,
    SHIPPED,
    STEPS,
    TINY_SIZES,
    Inputs,
    Kind,
    each,
    evaluate,
    fill,
    product,
    sharing,
    square,
    with_text,
)

SYSTEMS = ("unipic", "unipic-cached", "release", "editplus")
CACHED, FILL = "unipic-cached", "fill"
RELEASED_STEPS, RELEASED_GUIDANCE = 50, 4.0
DEPTH = MMDiTConfig().num_layers


@dataclass(frozen=True)
class Setup:
    """side: of the target, in tokens. counts: numbers of references. product: side of the matrices."""

    config: MMDiTConfig
    side: int
    counts: tuple[int, ...]
    product: int

    def load(self, system: str, count: int) -> Load:
        return with_text(square(self.side), (each if system == "editplus" else sharing)(self.side, count))


FULL_SIZE = Setup(MMDiTConfig(num_layers=3, num_attention_heads=12, joint_attention_dim=1792), 32, (0, 1, 3, 6), 2048)
TINY = Setup(TINY_SIZES, 6, (0, 6), 64)


# --- what runs --------------------------------------------------------------------------------------------------------


def picture(system: str, setup: Setup, count: int, form: str, dtype: torch.dtype) -> Run:
    """For a process of its own: build one system and evaluate it once, as in the first step of a picture."""
    kind = Kind(dtype)

    def run() -> None:
        network = kind.random(setup.config.with_attention_form(form if system == CACHED else None))
        inputs = kind.inputs(setup.config, setup.load(system, count))
        if system in ("release", "editplus"):
            by_diffusers(diffusers_network(network), inputs)
        else:
            evaluate(network, inputs, fill(network, inputs) if system == CACHED else None)

    return run


def by_diffusers(theirs: Any, inputs: Inputs) -> None:
    with torch.no_grad():
        evaluate_diffusers(theirs, inputs)


def runs_of(setup: Setup, networks: Mapping[str, Any], kind: Kind, count: int, forms: Sequence[str]) -> dict[str, Run]:
    """One evaluation of each system by its name, and what fills the cache, for several causal forms."""
    shared, theirs = kind.inputs(setup.config, setup.load("release", count)), networks["release"]
    runs: dict[str, Run] = {
        PRODUCT: product(kind, setup.product).run,
        "unipic": partial(evaluate, networks["unipic"], shared),
        "release": partial(by_diffusers, theirs, shared),
    }
    for form in forms:
        cache = fill(networks[form], shared)
        runs[f"{FILL} {form}"] = partial(fill, networks[form], shared)
        runs[f"{CACHED} {form}"] = partial(evaluate, networks[form], shared, cache)
    if count > 1:
        runs["editplus"] = partial(by_diffusers, theirs, kind.inputs(setup.config, setup.load("editplus", count)))
    return runs


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a step and a picture are made of: runs, and how often each; and the operations of one of each run."""

    step: Mapping[str, int]
    picture: Mapping[str, int]
    flops: Mapping[str, int]

    @property
    def step_flops(self) -> int:
        return sum(often * self.flops[name] for name, often in self.step.items())

    @property
    def picture_flops(self) -> int:
        return sum(often * self.flops[name] for name, often in self.picture.items())


def cost_of(setup: Setup, system: str, count: int, form: str, steps: int = STEPS, guided: bool = False) -> Cost:
    """With guidance a step is two evaluations."""
    load, config, evaluations = setup.load(system, count), setup.config, 2 if guided else 1
    if system == CACHED:
        config = config.with_attention_form(form)
        cached, filled = f"{CACHED} {form}", f"{FILL} {form}"
        flops = {cached: step_flops(config, load, cached=True), filled: fill_flops(config, load)}
        return Cost({cached: evaluations}, {filled: 1, cached: steps * evaluations}, flops)
    name = "release" if system == "editplus" and count <= 1 else system  # one reference is the whole budget
    whole = step_flops(config, load) if system == "unipic" else whole_flops(config, load)
    return Cost({name: evaluations}, {name: steps * evaluations}, {name: whole})


def row_of(
    setup: Setup, system: str, count: int, form: str, times: Times, steps: int = STEPS, guidance: float = 1.0
) -> dict[str, Any]:
    cost = cost_of(setup, system, count, form, steps, guidance != 1)
    rate = 2 * setup.product**3 / times.median(PRODUCT)
    return {
        "system": system,
        "references": count,
        "steps": steps,
        "guidance": guidance,
        "step_seconds": times.median(cost.step),
        "step_floor": cost.step_flops / rate,
        "picture_seconds": times.median(cost.picture),
        "picture_floor": cost.picture_flops / rate,
        "extrapolated": steps > len(times.seconds[PRODUCT]),
    }


def peak_of(setup: Setup, system: str, count: int, form: str, dtype: torch.dtype) -> dict[str, float]:
    """Columns of the memory, in MiB."""
    held = sum(p.numel() * dtype.itemsize for p in MMDiT(setup.config, device="meta").parameters())
    if system == CACHED:
        held += cache_bytes(setup.config.with_attention_form(form), setup.load(system, count), dtype.itemsize)
    peak = peak_of_its_own(picture, system, setup, count, form, dtype)
    return {"peak_mib": peak / MIB, "peak_floor": held / MIB}


def bar_of(
    setup: Setup, form: str, times: Times, limit: float, other: str, part: str, steps: int = STEPS, guided: bool = False
) -> Bar:
    """Of a cached step or picture with the most references, over another system's."""
    count = setup.counts[-1]

    def floor(setup: Setup) -> float:
        own, theirs = cost_of(setup, CACHED, count, form), cost_of(setup, other, count, form, steps, guided)
        return own.step_flops / theirs.step_flops if part == "step" else own.picture_flops / theirs.picture_flops

    own, theirs = cost_of(setup, CACHED, count, form), cost_of(setup, other, count, form, steps, guided)
    measured = times.ratio(own.step, theirs.step) if part == "step" else times.ratio(own.picture, theirs.picture)
    deep = floor(replace(setup, config=replace(setup.config, num_layers=DEPTH)))
    against = "a step" if part == "step" else f"{steps} steps with{'' if guided else 'out'} guidance"
    what = f"{count} references, {form}, a {part} over {against} of {other}"
    return Bar(what, measured, limit, floor(setup), note=f", {deep:.3f} in {DEPTH} layers")


def bars_of(setup: Setup, form: str, times: Times) -> list[Bar]:
    return [
        bar_of(setup, form, times, 0.62, "unipic", "step"),
        bar_of(setup, form, times, 0.65, "release", "picture"),
        bar_of(setup, form, times, 0.055, "release", "picture", RELEASED_STEPS, guided=True),
        bar_of(setup, form, times, 0.16, "editplus", "picture"),
    ]


# --- what comes out ---------------------------------------------------------------------------------------------------

COLUMNS: Columns = {
    "system": "<13",
    "references": ">10d",
    "steps": ">5d",
    "guidance": ">8.1f",
    "step_seconds": ">12.4f",
    "step_floor": ">10.4f",
    "picture_seconds": ">15.3f",
    "picture_floor": ">13.3f",
    "peak_mib": ">8.0f",
    "peak_floor": ">10.0f",
    "extrapolated": ">12",
}

PANELS = {
    "step_seconds": ("seconds per step", "step_floor"),
    "picture_seconds": (f"seconds per picture, {STEPS} steps", "picture_floor"),
    "peak_mib": ("peak memory, MiB", "peak_floor"),
}
"""Column -> title, and the column of its floor."""


def plot(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    for axis, (key, (_, floor)) in zip(axes, PANELS.items(), strict=True):
        for system in SYSTEMS:
            mine = [row for row in rows if row["system"] == system and row["steps"] == STEPS]
            counts = [row["references"] for row in mine]
            (made,) = axis.plot(counts, [row[key] for row in mine], marker="o", label=system)
            axis.plot(counts, [row[floor] for row in mine], ":", color=made.get_color())
        axis.set(xlabel="references", ylim=(0, None))
    axes[0].legend(fontsize=8, title="dotted: arithmetic", title_fontsize=8)


def rows_of(setup: Setup, count: int, form: str, times: Times, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """All rows of a number of references."""
    for system in SYSTEMS:
        peak = peak_of(setup, system, count, form, dtype)
        yield {**row_of(setup, system, count, form, times), **peak}
        if system == "release":
            yield {**row_of(setup, system, count, form, times, RELEASED_STEPS, RELEASED_GUIDANCE), **peak}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, rounds=STEPS)
    parser.add_argument("--form", choices=CAUSAL, default=SHIPPED, help="of unipic-cached")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    setup, path, kind = TINY if args.tiny else FULL_SIZE, result_file(args, "peers"), Kind(DTYPES[args.dtype])
    torch.manual_seed(0)
    ours = kind.random(setup.config)
    networks = {"unipic": ours, "release": diffusers_network(ours), **{f: kind.twin(ours, f) for f in CAUSAL}}
    result: dict[str, Any] = {"machine": machine(), "form": args.form, "dtype": args.dtype, "rows": []}
    print(heading(COLUMNS))
    for count in setup.counts:
        forms = CAUSAL if count == setup.counts[-1] else [args.form]
        # no rounds before: one slow run does not move a median, and a round takes half a minute
        times = in_turns(runs_of(setup, networks, kind, count, forms), args.rounds, warmup=0)
        for row in rows_of(setup, count, args.form, times, kind.dtype):
            result["rows"].append(row)
            print(line(COLUMNS, row), flush=True)
            write_json(path, result)  # after every row: a long table may be cut short
    other = next(form for form in CAUSAL if form != args.form)
    bars, other_bars = bars_of(setup, args.form, times), bars_of(setup, other, times)
    result["bars"] = [bar.record() for bar in bars]
    other_row = {"form": other, **row_of(setup, CACHED, count, other, times)}
    result["other_form"] = {"rows": [other_row], "bars": [bar.record() for bar in other_bars]}
    write_json(path, result)
    draw(path, [title for title, _ in PANELS.values()], partial(plot, result["rows"]))
    judge(other_bars)
    return int(judge(bars) and not args.tiny)  # toys miss them


if __name__ == "__main__":
    sys.exit(main())
