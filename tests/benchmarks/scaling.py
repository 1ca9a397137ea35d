"""`python -m tests.benchmarks.scaling [--json FILE]`: how time and memory grow with the task, on the CPU.

Along each axis one thing grows: references that share one budget or have one each, the target's tokens, the batch, the
text. Three runs: an uncached step, what fills the cache, a cached step. The exponent of a run is the slope of a line
through its points in logarithms of both (least squares), and beside it that of the arithmetic through the same points:
operations for the time; for the memory beyond the weights what activations and cache take. 1 is linear; a part that
does not grow makes it less. Peak memory of the cached step is that of filling the cache and taking the step.

All of it is 59 TFLOP at the default three rounds: about seven minutes on two quiet cores (0.16 TFLOP a second).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from trainers.tools.memory import ACTIVATIONS
from unipic_core.model.config import SEGMENTS, MMDiTConfig
from unipic_core.model.mmdit import MMDiT

from .arithmetic import Load, cache_bytes, fill_flops, step_flops
from .common import (
    MIB,
    Columns,
    Run,
    draw,
    heading,
    line,
    machine,
    make_parser,
    peak_of_its_own,
    result_file,
    write_json,
)
from .systems import CAUSAL, SHIPPED, TINY_SIZES, Kind, each, evaluate, fill, rated, sharing, square, with_text

KIND = Kind(torch.float32)
UNCACHED, FILL, CACHED = "uncached", "fill", "cached"
WORK = ACTIVATIONS["no"].forward
"""Bytes per token and channel of what a forward pass in float32 works with."""


@dataclass(frozen=True)
class Setup:
    """Of each axis the values that it takes. side: of the target on the others; references: on the last three."""

    config: MMDiTConfig
    side: int
    references: int
    counts: tuple[int, ...]
    sides: tuple[int, ...]
    batches: tuple[int, ...]
    texts: tuple[int, ...]
    product: int

    @property
    def axes(self) -> dict[str, dict[int, Load]]:
        """Name -> x -> load; the name says what x counts."""
        base = with_text(square(self.side), sharing(self.side, self.references))
        return {
            "references in one budget": {n: with_text(square(self.side), sharing(self.side, n)) for n in self.counts},
            "references of a budget each": {n: with_text(square(self.side), each(self.side, n)) for n in self.counts},
            "target tokens": {s**2: replace(base, target=square(s)) for s in self.sides},
            "batch": {n: replace(base, batch=n) for n in self.batches},
            "text tokens": {n: replace(base, text=n) for n in self.texts},
        }


FULL_SIZE = Setup(
    MMDiTConfig(num_layers=3, num_attention_heads=6, joint_attention_dim=896),
    side=32,
    references=3,
    counts=(0, 1, 2, 3, 4, 5, 6),
    sides=(16, 24, 32, 48, 64),
    batches=(1, 2, 4),
    texts=(64, 256, 1024, 4096),
    product=2048,
)
TINY = Setup(TINY_SIZES, 4, 2, (0, 1, 2), (4, 6), (1, 2), (4, 8), 64)


# --- what runs --------------------------------------------------------------------------------------------------------


def runs_of(full: MMDiT, causal: MMDiT, load: Load) -> dict[str, Run]:
    inputs = KIND.inputs(full.config, load)
    cache = fill(causal, inputs)
    return {
        UNCACHED: partial(evaluate, full, inputs),
        FILL: partial(fill, causal, inputs),
        CACHED: partial(evaluate, causal, inputs, cache),
    }


def step(config: MMDiTConfig, load: Load, cached: bool) -> Run:
    """For a process of its own; weights, and what torch loads for its first products, are not measured."""
    small = with_text(square(TINY.side), ())
    evaluate(KIND.random(TINY_SIZES), KIND.inputs(TINY_SIZES, small))
    network, inputs = KIND.random(config), KIND.inputs(config, load)
    return lambda: evaluate(network, inputs, fill(network, inputs) if cached else None)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def flops_of(config: MMDiTConfig, form: str, load: Load) -> dict[str, int]:
    causal = config.with_attention_form(form)
    return {
        UNCACHED: step_flops(config, load),
        FILL: fill_flops(causal, load),
        CACHED: step_flops(causal, load, cached=True),
    }


def memory_of(config: MMDiTConfig, load: Load) -> int:
    """Bytes that a step takes beyond the weights, its cache and the work on the longest segment included."""
    longest = max(sum(load.tokens[piece] for piece in pieces) for pieces in SEGMENTS[config.attention_form])
    return WORK * load.batch * longest * config.width + cache_bytes(config, load, KIND.dtype.itemsize)


def exponent(points: Mapping[float, float]) -> float | None:
    """The slope b of log y = a + b log x by least squares; points where either is 0 are left out, None below two."""
    logs = [(math.log(x), math.log(y)) for x, y in points.items() if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    x_mean, y_mean = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


# --- what comes out ---------------------------------------------------------------------------------------------------

POINTS: Columns = {
    "axis": "<28",
    "x": ">5d",
    "run": "<8",
    "seconds": ">9.4f",
    "floor": ">9.4f",
    "peak_mib": ">8.0f",
    "peak_arithmetic": ">15.0f",
}
EXPONENTS: Columns = {
    "axis": "<28",
    "run": "<8",
    "time": ">6.2f",
    "time_arithmetic": ">15.2f",
    "memory": ">6.2f",
    "memory_arithmetic": ">17.2f",
}


def points_of(setup: Setup, form: str, axis: str, networks: tuple[MMDiT, MMDiT], rounds: int) -> list[dict[str, Any]]:
    """The rows of an axis; all of its runs in turns."""
    loads = setup.axes[axis]
    runs = {(x, name): run for x, load in loads.items() for name, run in runs_of(*networks, load).items()}
    named = {f"{x} {name}": run for (x, name), run in runs.items()}
    times, per_second = rated(named, KIND, setup.product, rounds)
    rows = []
    for x, name in runs:
        flops = flops_of(setup.config, form, loads[x])[name]
        row = {"axis": axis, "x": x, "run": name, "seconds": times.median(f"{x} {name}"), "floor": flops / per_second}
        if name != FILL:
            config = setup.config.with_attention_form(form if name == CACHED else None)
            row["peak_mib"] = peak_of_its_own(step, config, loads[x], name == CACHED) / MIB
            row["peak_arithmetic"] = memory_of(config, loads[x]) / MIB
        rows.append(row)
    return rows


def exponents_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The slopes of one axis' rows, for each run."""
    made = []
    for name in (UNCACHED, FILL, CACHED):
        mine = [row for row in rows if row["run"] == name]

        def slope(key: str, mine: Sequence[Mapping[str, Any]] = mine) -> float | None:
            return exponent({row["x"]: row[key] for row in mine if key in row})

        keys = ("seconds", "floor", "peak_mib", "peak_arithmetic")
        values = dict(zip(list(EXPONENTS)[2:], map(slope, keys), strict=True))
        made.append({"axis": rows[0]["axis"], "run": name, **values})
    return made


def plot(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    for axis, title in zip(axes, dict.fromkeys(row["axis"] for row in rows), strict=True):
        for name in (UNCACHED, FILL, CACHED):
            mine = [row for row in rows if (row["axis"], row["run"]) == (title, name) and row["x"] and row["floor"]]
            x = [row["x"] for row in mine]
            (made,) = axis.plot(x, [row["seconds"] for row in mine], marker="o", label=name)
            axis.plot(x, [row["floor"] for row in mine], ":", color=made.get_color())
        axis.set(xscale="log", yscale="log", ylabel="seconds")
        ticks = sorted({row["x"] for row in rows if row["axis"] == title and row["x"]})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axis.set_xticks([], minor=True)
    axes[0].legend(fontsize=8, title="dotted: arithmetic", title_fontsize=8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--form", choices=CAUSAL, default=SHIPPED, help="of the cached step")
    args = parser.parse_args(argv)
    setup, path = TINY if args.tiny else FULL_SIZE, result_file(args, "scaling")
    torch.manual_seed(0)
    full = KIND.random(setup.config)
    networks = full, KIND.twin(full, args.form)
    result: dict[str, Any] = {"machine": machine(), "form": args.form, "rows": [], "exponents": []}
    print(heading(POINTS))
    for axis in setup.axes:
        rows = points_of(setup, args.form, axis, networks, args.rounds)
        print(*(line(POINTS, row) for row in rows), sep="\n", flush=True)
        result["rows"] += rows
        result["exponents"] += exponents_of(rows)
        write_json(path, result)  # after every axis: a long table may be cut short
    print(heading(EXPONENTS), *(line(EXPONENTS, row) for row in result["exponents"]), sep="\n")
    draw(path, list(setup.axes), partial(plot, result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
