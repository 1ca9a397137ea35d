"""`python -m tests.benchmarks.curation [--rows N] [--workers N] [--json FILE]`: speed and memory of data curation.

Pictures per second of each filter on one 1024 x 1024 photograph-like picture, and a run over drawn sources at a tenth
of the rows and at all of them, each in a process, with the seconds of its stages and its peak memory. Seconds are those
of the processor, so that other programs on the machine change them little; with one worker all work is in one process.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.paths import ROOT
from trainers.curate.filters.catalogue import FILTERS
from trainers.curate.filters.measure import _value
from trainers.curate.filters.packages import NEEDS, missing
from trainers.curate.filters.picture import Decoded, decode
from trainers.curate.manifest.scores import is_open

EXTRA = [name for name in NEEDS if not FILTERS[name].needs_sources]
RESULT = ROOT / "tests" / "benchmarks" / "results" / "curation-cpu-2cores.json"
FILTER = {
    "pixels": {"least": 16384}, "aspect": None, "sharpness": {"least": 10}, "detail": {"least": 0.1}, "exposure": None,
    "contrast": None, "flat": None, "border": {"most": 0.3}, "inside": None, "occupancy": {"least": 0.3},
    "clutter": {"most": 0.95}, "duplicates": None,
}  # fmt: skip


def photograph(side: int = 1024) -> bytes:
    """JPEG with contrast in all octaves."""
    rng, total, cells = np.random.default_rng(0), np.zeros((side, side, 3), np.float32), 4
    while cells <= side:
        noise = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        cells *= 2
    buffer = io.BytesIO()
    scaled = (total - total.min()) / (total.max() - total.min()) * 255
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def rate(work: Callable[[], Any], seconds: float = 1.0) -> float:
    """Calls per second of one core, after one that does not count."""
    work()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        work()
        count += 1
    return count / (time.process_time() - start)


def rates(seconds: float = 1.0) -> dict[str, float]:
    """Pictures per second of decoding, of the reduction to 256 pixels, of each filter after it, and of all together."""
    data = photograph()
    picture = decode(data, "benchmark")
    found = {"decode": rate(lambda: decode(data, "benchmark"), seconds)}
    found["reduce"] = rate(lambda: Decoded(picture.rgb).luma, seconds)
    numbers = [one for one in FILTERS.values() if one.rank == "numpy" and not one.needs_sources]

    def all_numpy() -> None:
        fresh = decode(data, "benchmark")
        for one in numbers:
            _value(one, fresh)

    found["decode and all of numpy"] = rate(all_numpy, seconds)
    for name, one in FILTERS.items():
        if one.rank != "endpoint" and not one.needs_sources:
            value = _value(one, picture)
            if not is_open(value):
                found[name] = rate(lambda one=one: _value(one, picture), seconds)
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def settings(rows: int, out: Path, workers: int) -> dict[str, Any]:
    """STAGES of a run over so many drawn sources."""
    numbers = {"persons": rows * 3 // 10, "objects": rows * 6 // 10, "backgrounds": rows // 10}
    return {
        "out": str(out),
        "workers": workers,
        "ingest": [{"kind": "drawn", **numbers, "size": 128}],
        "filter": FILTER,
        "pair": {"rules": "drawn", "rows": rows // 5, "counts": {3: 3, 4: 2, 5: 1, 6: 1},
                 "always": ["background"]},
        "prompt": {"kind": "drawn"},
        "synthesise": {"kind": "drawn", "size": 128},
        "check": {"flat": None, "likeness": None},
    }  # fmt: skip


def extra_settings(rows: int, out: Path, workers: int) -> dict[str, Any]:
    """STAGES of the filters of the extra [curate] over drawn pictures: for their speed, not for their verdicts."""
    sources = {"kind": "drawn", "persons": rows // 2, "objects": rows // 2, "size": 128}
    return {"out": str(out), "workers": workers, "ingest": [sources], "filter": dict.fromkeys(EXTRA)}


def timed_run(rows: int, workers: int, make: Callable[[int, Path, int], dict[str, Any]] = settings) -> dict[str, Any]:
    """Seconds by stage, counts, and peak memory of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stages.yaml"
        path.write_text(yaml.safe_dump(make(rows, Path(folder) / "out", workers), sort_keys=False))
        command = [sys.executable, "-m", "tests.benchmarks.curation", "--stages", str(path)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        found["summary"] = json.loads((Path(folder) / "out" / "summary.json").read_text())
    return found


def run_here(path: Path) -> None:
    """Run the stages and print the seconds of each and the peak memory as JSON."""
    import trainers.curate.runner as runner
    from trainers.curate.config import read_stages

    marks: list[tuple[str, float]] = []
    start, wall = time.process_time(), time.perf_counter()
    for name in ("ingest", "filter_pictures", "pair", "prompt", "synthesise", "sheets_of", "export"):
        setattr(runner, name, marked(getattr(runner, name), name, marks))
    runner.run(read_stages(path))
    seconds: dict[str, float] = {}
    for name, spent in marks:
        seconds[name] = seconds.get(name, 0.0) + spent
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = time.process_time() - start
    elapsed = round(time.perf_counter() - wall, 1)
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    print(
        json.dumps(
            {
                "seconds": rounded,
                "total": round(total, 1),
                "elapsed": elapsed,
                "peak_mib": peaks[0],
                "worker_mib": peaks[1],
            }
        )
    )


def marked(function: Callable[..., Any], name: str, marks: list[tuple[str, float]]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **options)
        finally:
            marks.append((name, time.process_time() - start))

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="drawn sources of the larger run; 0: no run")
    parser.add_argument("--extra", type=int, default=200, help="pictures for the filters of the extra [curate]")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stages:
        return run_here(args.stages)
    results: dict[str, Any] = {"pictures_per_second": rates()}
    print(json.dumps(results["pictures_per_second"], indent=1))
    results["runs"] = {}
    for rows in (args.rows // 10, args.rows) if args.rows else ():
        results["runs"][str(rows)] = timed_run(rows, args.workers)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.extra and not any(missing(name) for name in NEEDS):
        results["extra"] = timed_run(args.extra, args.workers, extra_settings)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
