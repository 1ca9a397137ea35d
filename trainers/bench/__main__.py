"""Generate, score and report the pictures of a benchmark.

    python -m trainers.bench run --bench own --root FILE.jsonl --model PATH --out DIR
    python -m trainers.bench score --out DIR [--judge FILE.yaml [--record FILE] | --replay FILE] [--controls]
    python -m trainers.bench report --out DIR

Each command can be interrupted; running it again continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..terminal import exit_code
from .cases import BENCHES
from .make import run
from .report import report
from .score import score


def parser() -> argparse.ArgumentParser:
    """Parser of all commands."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="trainers.bench", description=__doc__, formatter_class=formatter)
    commands = top.add_subparsers(dest="command", required=True)
    make = commands.add_parser("run", help="generate pictures")
    judge = commands.add_parser("score", help="add scores")
    show = commands.add_parser("report", help="write tables and an HTML page")
    add_run_options(make)
    add_score_options(judge)
    for command in (make, judge, show):
        command.add_argument("--out", type=Path, required=True, metavar="DIR")
    return top


def add_run_options(make: argparse.ArgumentParser) -> None:
    """Add the options of ``run``: the benchmark, and the systems as ``systems_of`` reads them."""
    make.add_argument("--bench", required=True, choices=BENCHES)
    make.add_argument(
        "--root", type=Path, help="the benchmark's folder; own, multicom: a JSONL file; omniref: its list"
    )
    make.add_argument("--n", type=int, help="only the first N cases")
    make.add_argument("--seed", type=int, default=0, help="of the noise and of drawn scenes (%(default)s)")
    make.add_argument("--model", action="append", default=[], metavar="PATH", help="repeatable, once per system")
    for name, kind in (("lora", str), ("steps", int), ("cfg", float), ("label", str)):
        make.add_argument(
            f"--{name}", action="append", default=[], type=kind, help="once for all systems, or once per system"
        )
    make.add_argument("--sampler", action="append", default=[], choices=["consistency", "euler"])
    make.add_argument(
        "--size", type=int, help="nano: side of the scenes in pixels; default: in the first --model's recipe"
    )
    make.add_argument("--budget", type=int, help="side of the reference budget in pixels")
    make.add_argument(
        "--pictures", action="append", default=[], metavar="LABEL=DIR", help="pictures of another program"
    )
    make.add_argument("--device", default="auto", help="auto, cuda or cpu (%(default)s)")
    make.set_defaults(controls_only=False)


def add_score_options(judge: argparse.ArgumentParser) -> None:
    """Add the options of ``score``: the judge, its questions, and the weights of MICo-Bench."""
    judge.add_argument(
        "--judge", type=Path, metavar="FILE.yaml", help="settings of a judge on your server; without: PSNR to the truth"
    )
    judge.add_argument("--record", type=Path, metavar="FILE", help="record the judge's answers")
    judge.add_argument("--replay", type=Path, metavar="FILE", help="use recorded answers instead of a server")
    judge.add_argument("--template", help="name of a question template")
    judge.add_argument("--templates", type=Path, metavar="DIR", help="question texts from a checkout of the benchmark")
    judge.add_argument("--controls", action="store_true", help="test the judge on pictures of known order")
    judge.add_argument("--weights", type=Path, metavar="DIR", help="weights of MICo-Bench")
    judge.add_argument("--w-judge", action="store_true", help="weights of MICo-Bench by the judge in place of ArcFace")
    judge.add_argument("--w-one", action="store_true", help="MICo-Bench without weights: W = 1")
    judge.add_argument("--enforce-cap", action="store_true", help="imgedit: no mark counts for more than the first")


def run_command(args: argparse.Namespace) -> None:
    """Run the chosen command. Raises ValueError in one sentence for bad input."""
    if args.command == "report":
        report(args.out)
        print(args.out / "report.html")
    else:
        {"run": run, "score": score}[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (``exit_code``)."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run_command(args), "run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())
