"""What the benchmarks share: runs timed in turns, peak memory, bars, tables, and the files of results.

Nothing of torch is imported with this module: a benchmark inside ComfyUI imports it before ComfyUI has set torch up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unipic_core import replacing

RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Run = Callable[[], Any]
Clock = Callable[[], float]


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds of every run by its name; equal places in two rows are neighbours, of one round."""

    seconds: Mapping[str, Sequence[float]]

    def sums(self, parts: Mapping[str, float]) -> list[float]:
        """Of every round, the seconds of some runs times a number each."""
        columns = [[times * s for s in self.seconds[name]] for name, times in parts.items()]
        return [sum(row) for row in zip(*columns, strict=True)]

    def median(self, parts: str | Mapping[str, float]) -> float:
        return statistics.median(self.sums(_parts(parts)))

    def ratio(self, first: str | Mapping[str, float], second: str | Mapping[str, float]) -> float:
        """The median of the ratios of neighbours, which machine noise moves least."""
        pairs = zip(self.sums(_parts(first)), self.sums(_parts(second)), strict=True)
        return statistics.median(a / b for a, b in pairs)


def _parts(parts: str | Mapping[str, float]) -> Mapping[str, float]:
    return {parts: 1.0} if isinstance(parts, str) else parts


def in_turns(
    runs: Mapping[str, Run], rounds: int, wait: Run = lambda: None, warmup: int = 1, clock: Clock = time.perf_counter
) -> Times:
    """Every run once in each round, there and back, so that a drift of the machine favours none.

    wait: until a run's work is done, where it goes on behind its return. warmup: rounds before those that count. clock:
    time.process_time counts processor time, which other programs on the machine do not lengthen by taking turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name in reversed(list(runs)) if i % 2 else runs:
            seconds[name].append(timed(runs[name], wait, clock))
    return Times({name: row[warmup:] for name, row in seconds.items()})


def timed(run: Run, wait: Run = lambda: None, clock: Clock = time.perf_counter) -> float:
    """Seconds of one run."""
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


# --- memory -----------------------------------------------------------------------------------------------------------


def process_status(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_added(run: Run) -> int:
    """Bytes that a run adds, at most, to what this process holds (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest memory so far
    before = process_status("VmRSS")
    run()
    return process_status("VmHWM") - before


def peak_of_its_own(make: Callable[..., Run], *args: Any) -> int:
    """`peak_added` of the run make(*args) in a process of its own, in which only imports came before. make: of a
    module's top level; what it holds itself is not counted."""
    context = multiprocessing.get_context("forkserver")  # imports once; a fork of this process would inherit its memory
    script = getattr(sys.modules["__main__"].__spec__, "name", "")  # each process runs that again by itself
    ours = [n for n in sys.modules if n.split(".")[0] in ("tests", "trainers", "unipic_core") and n != script]
    context.set_forkserver_preload(ours)
    with context.Pool(1) as pool:
        return pool.apply(_peak_of_made, (make, args))


def _peak_of_made(make: Callable[..., Run], args: Sequence[Any]) -> int:
    return peak_added(make(*args))


# --- bars -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A figure, what it has to reach, and what arithmetic alone would make of it.

    judged: whether the limit was set for this machine.
    """

    what: str
    measured: float
    limit: float
    floor: float
    at_most: bool = True
    judged: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        if not self.judged:
            return "set for another device"
        kept = self.measured <= self.limit if self.at_most else self.measured >= self.limit
        return "PASS" if kept else "FAIL"

    def line(self) -> str:
        word = "at most" if self.at_most else "at least"
        figures = f"{self.measured:.3f} ({word} {self.limit}; arithmetic {self.floor:.3f}{self.note})"
        return f"{self.what}: {figures}  {self.verdict}"

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def judge(bars: Sequence[Bar]) -> bool:
    """Print all bars; True if one is missed."""
    for bar in bars:
        print(bar.line())
    return any(bar.verdict == "FAIL" for bar in bars)


# --- what comes out ---------------------------------------------------------------------------------------------------

Columns = Mapping[str, str]
"""Key of a row -> how it is printed: ">9.3f", "<14"."""


def heading(columns: Columns) -> str:
    return "  ".join(format(name, re.sub(r"\..*|[a-z]", "", spec)) for name, spec in columns.items())


def line(columns: Columns, row: Mapping[str, Any]) -> str:
    """One row of a table; what it does not have is left blank."""
    cells = []
    for name, spec in columns.items():
        value = row.get(name)
        plain = value is None or isinstance(value, (str, bool))
        text = "" if value is None else {True: "yes", False: "no"}.get(value, value) if plain else value
        cells.append(format(text, re.sub(r"\..*|[a-z]", "", spec) if plain else spec))
    return "  ".join(cells)


def machine(cuda: bool = False) -> dict[str, Any]:
    """What a result file says of where it comes from. cuda: the GPU is what is measured."""
    import torch

    return {
        "device": device_name(cuda),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def device_name(cuda: bool = False) -> str:
    """For file names: "cpu-2cores", "nvidia-h100-80gb-hbm3"."""
    import torch

    if cuda:
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"cpu-{os.cpu_count()}cores"


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Nothing where there is no path."""
    if path is not None:
        replacing.write_json(path, result, indent=1)


def draw(path: Path | None, panels: Sequence[str], fill: Callable[[Sequence[Any]], None]) -> None:
    """A picture beside the result file `path`, if there is one and there are panels. fill: draws into them, given in
    their order."""
    if path is None or not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[0], panels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    fill(list(axes[0]))
    with replacing.replacing(path.with_suffix(".png")) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


def draw_bars(axis: Any, figures: Mapping[str, tuple[float, float]]) -> None:
    """What was measured, by name, as bars from the top; the arithmetic's beside each as a dotted line across it."""
    places = range(len(figures))
    axis.barh(places, [measured for measured, _ in figures.values()], height=0.5)
    ends = [[place + end for place in places] for end in (-0.45, 0.45)]
    axis.vlines([floor for _, floor in figures.values()], *ends, "black", "dotted")
    axis.set_yticks(places, labels=list(figures), fontsize=7)
    axis.set(ylim=(len(figures) - 0.4, -0.6), xlim=(0, None))
    axis.set_xlabel("dotted: arithmetic", fontsize=8)


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks of the network have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: by the device, in tests/benchmarks/results")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default {rounds})")
    parser.add_argument("--tiny", action="store_true", help="sizes of toys, to try the benchmark itself")
    parser.set_defaults(parser=parser)  # `changed_options` asks it
    return parser


def result_file(args: argparse.Namespace, name: str, cuda: bool = False) -> Path | None:
    """Where a benchmark writes; toys write nothing unless they are told where."""
    if args.json is not None or args.tiny:
        return args.json
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{device_name(cuda)}{changed_options(args)}.json"


def changed_options(args: argparse.Namespace) -> str:
    """For file names: the options that are not at their defaults, "-dtype-bfloat16", so that no result replaces that of
    another question. args: of a parser that is its own default for `parser`."""
    changed = {
        name: value.stem if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("json", "parser") and value != args.parser.get_default(name)
    }
    return "".join(f"-{name}-{value}" for name, value in changed.items())
