"""Curate a data set, or show conflict rules.

python -m trainers.curate run STAGES.yaml [--dry-run] [--executor local|ray]
python -m trainers.curate conflicts FILE.yaml --matrix [--out matrix.png]
python -m trainers.curate conflicts FILE.yaml hat mug person
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..terminal import exit_code
from .conflicts.matrix import describe, draw_matrix
from .conflicts.rules import read_rules
from .conflicts.solve import solve
from .conflicts.wording import instruction
from .errors import CurateError
from .manifest.executor import EXECUTORS


def conflicts(args: argparse.Namespace) -> None:
    """Print the matrix, or the slot of each category in one picture. Raises CurateError."""
    rules = read_rules(args.file)
    if not (args.matrix or args.out or args.categories):
        known = ", ".join(rules.categories)
        raise CurateError(f"expected --matrix, --out FILE, or categories to put into one picture; known: {known}")
    if args.matrix:
        print(describe(rules))
    if args.out:
        draw_matrix(rules).save(args.out)
    if args.categories:
        solution = solve(rules, args.categories)
        for name, seat in zip(args.categories, solution.seats, strict=bool(solution.seats)):
            print(f"{name}: {', '.join(seat.slots) or 'free'}")
        if solution.possible:
            print(instruction(rules, args.categories, solution.seats))
        else:
            print(f"not together: {'; '.join(solution.broken)}")


def run(args: argparse.Namespace) -> None:
    """Run or continue the stages, or print what a run would do."""
    from .config import read_stages
    from .dry_run import describe as describe_run
    from .runner import check_settings
    from .runner import run as run_stages

    stages = read_stages(args.file)
    if args.dry_run:
        check_settings(stages)
        print(describe_run(stages))
    else:
        run_stages(stages, args.executor)


def parser() -> argparse.ArgumentParser:
    """Parser of both commands."""
    top = argparse.ArgumentParser(
        prog="trainers.curate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run the stages of a file, or continue them")
    one.add_argument("file", type=Path, help="STAGES.yaml; see docs/curation.md")
    one.add_argument("--dry-run", action="store_true", help="print the pictures, calls and megapixels, and stop")
    one.add_argument(
        "--executor",
        choices=EXECUTORS,
        default="local",
        help="processes that measure and draw: of this machine, or of Ray (%(default)s)",
    )
    one.set_defaults(run=run)
    one = commands.add_parser("conflicts", help="which categories may share a picture")
    one.add_argument("file", type=Path, help="a YAML file of rules")
    one.add_argument("categories", nargs="*", help="check one picture with these")
    one.add_argument("--matrix", action="store_true", help="print the table")
    one.add_argument("--out", type=Path, help="write the matrix as a picture")
    one.set_defaults(run=conflicts)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (``exit_code``)."""
    args = parser().parse_args(argv)
    return exit_code(lambda: args.run(args), "run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())
