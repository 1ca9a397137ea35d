"""`python -m tests.benchmarks.gpu [--json FILE]`: a picture of the full-size network on a GPU, with random weights.

In bfloat16 and in fp8 (every linear layer by torch._scaled_mm, attention in bfloat16): seconds per step at 1024^2 for
0, 1, 3 and 6 references that share a megapixel, cached and not, compiled and not; the rate that this reaches against a
large matrix product of the same precision, timed in the same rounds; peak memory. VAE and text encoder are timed apart.
A floor is the arithmetic's operations at the product's rate. Without a CUDA device there is nothing to measure, but
--tiny runs all of it on a toy, on any machine.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from unipic_core.conditioning.sequence import LatentShape
from unipic_core.model.attention import ATTENTIONS, attention_named
from unipic_core.model.compile import check_compiler, compile_blocks
from unipic_core.model.config import FULL, MMDiTConfig
from unipic_core.model.mmdit import MMDiT

from .arithmetic import Load, count_flops, fill_flops, step_flops
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
    peak_added,
    result_file,
    write_json,
)
from .gpu_parts import RELEASED, Parts, encoder_numbers, reference_pixels, text_runs, vae_runs
from .gpu_parts import TINY as TINY_PARTS
from .scaled_fp8 import ScaledOperations
from .systems import (
    CAUSAL,
    CPU,
    PRODUCT,
    SHIPPED,
    STEPS,
    TINY_SIZES,
    Inputs,
    Kind,
    Product,
    evaluate,
    fill,
    product,
    with_text,
)

PRECISIONS: dict[str, Any] = {"bf16": nn, "fp8": ScaledOperations}
UNCACHED, FILL, CACHED = "uncached", "fill", "cached"
COMPILED = " compiled"
SPARE = 1.3
"""Memory that must be free, over that of the weights."""

FP8_CAPABILITY = 8, 9
"""Ada and Hopper are the first whose units multiply fp8."""

LEAST_RATE = 0.6
PICTURE_LIMITS = {"bf16": 2.2, "fp8": 1.6}
LIMITS_FOR = "h100"


@dataclass(frozen=True)
class Setup:
    """size: side of the output in pixels. product: side of the matrices. backend: of torch.compile."""

    config: MMDiTConfig
    size: int
    counts: tuple[int, ...]
    product: int
    backend: str
    parts: Parts

    def load(self, count: int) -> Load:
        references = (LatentShape.of_pixels(*pixels) for pixels in reference_pixels(self.size, count))
        return with_text(LatentShape.of_pixels(self.size, self.size), tuple(references))


FULL_SIZE = Setup(MMDiTConfig(), 1024, (0, 1, 3, 6), 8192, "inductor", RELEASED)
TINY = Setup(TINY_SIZES, 64, (0, 6), 64, "eager", TINY_PARTS)


@dataclass(frozen=True)
class Bench:
    """What all parts are measured with."""

    setup: Setup
    form: str
    rounds: int

    def turns(self, runs: Mapping[str, Run], kind: Kind) -> Times:
        wait = torch.cuda.synchronize if kind.device.type == "cuda" else (lambda: None)
        return in_turns(runs, self.rounds, wait)


def peak_of(run: Run, device: torch.device) -> int:
    """Bytes in use at most during a run: on a GPU everything in it, the weights included; on a CPU what is added."""
    if device.type != "cuda":
        return peak_added(run)
    run()  # compiles, and lets the libraries take their workspaces
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def room_for(numbers: float, itemsize: int, device: torch.device) -> bool:
    """Whether a GPU has memory for so many weights and what works with them, after giving back what was used before."""
    if device.type != "cuda":
        return True
    gc.collect()  # compiled code and the networks in it hold each other
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] > SPARE * numbers * itemsize


def has_units(precision: str, device: torch.device) -> bool:
    """Whether a GPU multiplies in this precision; a CPU does it all, slowly."""
    return precision != "fp8" or device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


# --- the network ------------------------------------------------------------------------------------------------------


def networks_of(bench: Bench, kind: Kind) -> dict[str, MMDiT]:
    """Both forms, plain and compiled, on the same memory."""
    plain = kind.random(bench.setup.config)
    made = {UNCACHED: plain, CACHED: kind.twin(plain, bench.form)}
    for name, form in ((UNCACHED, FULL), (CACHED, bench.form)):
        made[name + COMPILED] = kind.twin(plain, form)
        compile_blocks(made[name + COMPILED], bench.setup.backend)
    return made


def cached_picture(network: MMDiT, inputs: Inputs) -> None:
    """The start of a picture: the cache, and the first step."""
    evaluate(network, inputs, fill(network, inputs))


def rows_of(bench: Bench, precision: str, networks: Mapping[str, MMDiT], kind: Kind) -> Iterator[dict[str, Any]]:
    """The network's rows in one precision. graphs: pieces of compiled code so far, of both forms; they should not grow
    with the references."""
    counters.clear()
    for count in bench.setup.counts:
        load = bench.setup.load(count)
        peaks, times = measured(bench, load, networks, kind)
        for name, peak in peaks.items():
            figures = figures_of(bench, load, name, times)
            graphs = {"graphs": counters["stats"]["unique_graphs"]} if figures["compiled"] else {}
            yield {"precision": precision, "references": count, **figures, "peak_mib": peak / MIB, **graphs}


def measured(bench: Bench, load: Load, networks: Mapping[str, MMDiT], kind: Kind) -> tuple[dict[str, int], Times]:
    """Peaks of the runs that a picture consists of, and times of all. A function, so that nothing of it is in memory
    when the next is measured."""
    inputs = kind.inputs(bench.setup.config, load)
    peaks, runs = {}, {PRODUCT: product(kind, bench.setup.product).run}
    for end in ("", COMPILED):
        whole, causal = networks[UNCACHED + end], networks[CACHED + end]
        runs[UNCACHED + end] = partial(evaluate, whole, inputs)
        peaks[UNCACHED + end] = peak_of(runs[UNCACHED + end], kind.device)
        peaks[CACHED + end] = peak_of(partial(cached_picture, causal, inputs), kind.device)
    cache = fill(networks[CACHED], inputs)  # after the peaks, in which it would count
    for end in ("", COMPILED):
        runs[FILL + end] = partial(fill, networks[CACHED + end], inputs)
        runs[CACHED + end] = partial(evaluate, networks[CACHED + end], inputs, cache)
    return peaks, bench.turns(runs, kind)


def figures_of(bench: Bench, load: Load, name: str, times: Times) -> dict[str, Any]:
    """Times and rates of a step and of a picture. name: of its run."""
    cached, config = name.startswith(CACHED), bench.setup.config
    causal, end = config.with_attention_form(bench.form), COMPILED if name.endswith(COMPILED) else ""
    flops = step_flops(causal, load, cached=True) if cached else step_flops(config, load)
    picture, operations = {name: STEPS}, STEPS * flops
    if cached:
        picture, operations = {FILL + end: 1, **picture}, operations + fill_flops(causal, load)
    large = 2 * bench.setup.product**3
    return {
        "cached": cached,
        "compiled": bool(end),
        "step_seconds": times.median(name),
        "step_floor": flops / large * times.median(PRODUCT),
        "picture_seconds": times.median(picture),
        "picture_floor": operations / large * times.median(PRODUCT),
        "tflops": flops / times.median(name) / 1e12,
        "of_product": flops / large * times.ratio(PRODUCT, name),
    }


# --- beside the network -----------------------------------------------------------------------------------------------


def part_rows(bench: Bench, kind: Kind) -> Iterator[dict[str, Any]]:
    """The VAE's and the text encoder's, one after the other, so that one is in memory."""
    large = product(kind, bench.setup.product)
    for make in (vae_runs, text_runs):
        numbers = encoder_numbers(bench.setup.parts) if make is text_runs else 0
        if not room_for(numbers, kind.dtype.itemsize, kind.device):
            print("text encoder: left out, the GPU has not enough free memory for it")
            continue
        yield from rows_of_part(bench, make(bench.setup.parts, kind, bench.setup.size), large, kind)


def rows_of_part(bench: Bench, runs: Mapping[str, Run], large: Product, kind: Kind) -> Iterator[dict[str, Any]]:
    """Of all that one part does."""
    peaks = {name: peak_of(run, kind.device) for name, run in runs.items()}
    times = bench.turns({PRODUCT: large.run, **runs}, kind)
    for name, run in runs.items():
        floor = count_flops(run) / large.flops * times.median(PRODUCT)
        yield {"part": name, "seconds": times.median(name), "floor": floor, "peak_mib": peaks[name] / MIB}


# --- what comes out ---------------------------------------------------------------------------------------------------

COLUMNS: Columns = {
    "precision": "<9",
    "references": ">10d",
    "cached": ">6",
    "compiled": ">8",
    "step_seconds": ">12.4f",
    "step_floor": ">10.4f",
    "picture_seconds": ">15.3f",
    "picture_floor": ">13.3f",
    "tflops": ">7.1f",
    "of_product": ">10.2f",
    "peak_mib": ">8.0f",
    "graphs": ">6d",
}
PART_COLUMNS: Columns = {"part": "<30", "seconds": ">9.4f", "floor": ">9.4f", "peak_mib": ">8.0f"}


def bars_of(rows: Sequence[Mapping[str, Any]], count: int, device: str) -> list[Bar]:
    """What the faster of compiled and not must reach with the most references."""
    most, bars = [row for row in rows if row["references"] == count], []
    uncached = [row for row in most if row["precision"] == "bf16" and not row["cached"]]
    if uncached:
        rate = max(row["of_product"] for row in uncached)
        what = f"{count} references, bf16, uncached: rate over the matrix product's"
        bars.append(Bar(what, rate, LEAST_RATE, 1.0, at_most=False))
    for precision, limit in PICTURE_LIMITS.items():
        cached = [row for row in most if row["precision"] == precision and row["cached"]]
        if cached:
            best = min(cached, key=lambda row: row["picture_seconds"])
            what = f"{count} references, {precision}, cached: seconds of {STEPS} steps"
            judged = LIMITS_FOR in device
            bars.append(Bar(what, best["picture_seconds"], limit, best["picture_floor"], judged=judged))
    return bars


def plot(rows: Sequence[Mapping[str, Any]], axes: Sequence[Any]) -> None:
    for axis, precision in zip(axes, dict.fromkeys(row["precision"] for row in rows), strict=True):
        for cached in (False, True):
            for compiled in (False, True):
                mine = [
                    r for r in rows if (r["precision"], r["cached"], r["compiled"]) == (precision, cached, compiled)
                ]
                label = (CACHED if cached else UNCACHED) + (COMPILED if compiled else "")
                counts = [row["references"] for row in mine]
                (made,) = axis.plot(counts, [row["step_seconds"] for row in mine], marker="o", label=label)
            axis.plot(counts, [row["step_floor"] for row in mine], ":", color=made.get_color())
        axis.set(xlabel="references", ylabel="seconds per step", ylim=(0, None))
    axes[0].legend(fontsize=8, title="dotted: arithmetic", title_fontsize=8)


def measure_network(bench: Bench, kind: Kind, precision: str, result: dict[str, Any], path: Path | None) -> None:
    """Append the rows of one precision to the result, print and write them."""
    if not has_units(precision, kind.device):
        print(f"{precision}: left out, this GPU has no {precision} units")
        return
    numbers = sum(p.numel() for p in MMDiT(bench.setup.config, device="meta").parameters())
    itemsize = 1 if precision == "fp8" else kind.dtype.itemsize
    if not room_for(numbers, itemsize, kind.device):
        print(f"{precision}: left out, the network needs {SPARE * numbers * itemsize / 2**30:.0f} GiB of free memory")
        return
    for row in rows_of(bench, precision, networks_of(bench, kind), kind):
        result["rows"].append(row)
        print(line(COLUMNS, row), flush=True)
        write_json(path, result)  # after every row: a long table may be cut short


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--form", choices=CAUSAL, default=SHIPPED, help="of the cached step")
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not args.tiny:
        print("gpu: nothing measured, there is no CUDA device; --tiny runs a toy on the CPU")
        return 0
    if not args.tiny:
        check_compiler("cuda")
    path, about = result_file(args, "gpu", cuda), machine(cuda)
    bench = Bench(TINY if args.tiny else FULL_SIZE, args.form, args.rounds)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": about, "form": args.form, "attention": args.attention, "rows": []}
    kind = Kind(torch.bfloat16, torch.device("cuda", 0) if cuda else CPU, attention=attention_named(args.attention))
    print(heading(COLUMNS))
    for precision, operations in PRECISIONS.items():
        measure_network(bench, replace(kind, operations=operations), precision, result, path)
        torch.compiler.reset()  # forgets what is compiled; `room_for` then frees the networks that it kept alive
    print(heading(PART_COLUMNS))
    result["parts"] = list(part_rows(bench, kind))
    print(*(line(PART_COLUMNS, row) for row in result["parts"]), sep="\n")
    bars = bars_of(result["rows"], bench.setup.counts[-1], about["device"])
    result["bars"] = [bar.record() for bar in bars]
    write_json(path, result)
    draw(path, list(dict.fromkeys(row["precision"] for row in result["rows"])), partial(plot, result["rows"]))
    return int(judge(bars) and not args.tiny)  # toys miss them


if __name__ == "__main__":
    sys.exit(main())
