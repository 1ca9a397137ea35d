"""`python -m tests.benchmarks.startup REVISION [--runs N] [--json FILE]`: start-up now against an earlier revision.

Programs of the two versions run alternately, so that both meet the same load; the ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.paths import PICTURES, ROOT

RESULT = ROOT / "tests" / "benchmarks" / "results" / "startup-cpu-2cores.json"
OPEN = """
from unipic_core.pipeline import UniPicPipeline
UniPicPipeline.from_pretrained("unipic_core/models/unipic-nano", device="cpu")
"""


def programs(out: Path) -> dict[str, list[str]]:
    """Name -> arguments of Python."""
    pictures = [str(PICTURES / f"{name}.png") for name in ("man-office-worker", "tent", "desert")]
    compose = [
        "-m",
        "unipic_core",
        "compose",
        *pictures,
        "--prompt",
        "The tent from image 2 in image 3",
        "--steps",
        "1",
    ]
    return {
        "help": ["-m", "unipic_core", "--help"],
        "open the bundled model": ["-c", OPEN],
        "compose three references, one step": [
            *compose,
            "--steps",
            "1",
            "--size",
            "64x64",
            "--device",
            "cpu",
            "--out",
            str(out / "out.png"),
        ],
    }


def seconds(folder: Path, arguments: list[str]) -> float:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    return time.perf_counter() - start


def compared(before: Path, runs: int) -> dict[str, dict[str, float]]:
    rows = {}
    with tempfile.TemporaryDirectory() as out:
        for name, arguments in programs(Path(out)).items():
            times: dict[str, list[float]] = {"before": [], "now": []}
            for turn in range(runs + 1):  # the first fills the disk's cache
                for key, folder in (("before", before), ("now", ROOT)):
                    (Path(out) / "out.png").unlink(missing_ok=True)
                    took = seconds(folder, arguments)
                    if turn:
                        times[key].append(took)
            medians = {key: statistics.median(values) for key, values in times.items()}
            rows[name] = {**medians, "ratio": medians["now"] / medians["before"]}
            print(f"{name:40} {medians['before']:6.2f} s before {medians['now']:6.2f} s now {rows[name]['ratio']:5.2f}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit, or the folder of a checkout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(args.revision).resolve()
        if not before.is_dir():
            before = Path(folder) / "before"
            before.mkdir()
            archive = subprocess.run(["git", "archive", args.revision], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "-x", "-C", str(before)], input=archive.stdout, check=True)
        rows = compared(before, args.runs)
    args.json.write_text(json.dumps({"revision": args.revision, "runs": args.runs, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
