"""`python -m tests.benchmarks.path [FOLDER]`: files, functions and file switches of one compose with three references.

FOLDER: another checkout, to compare with; each is traced in a process of its own. Also counted: how often Python opens
each weight file of a compose with a LoRA (files that safetensors maps itself are not seen).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.paths import PICTURES, ROOT, TINY

LORA = ROOT / "tests" / "compat" / "fixtures" / "weights" / "lora.safetensors"
TRACE = """
import collections, json, sys
root, arguments = sys.argv[1], sys.argv[2:]
functions, files, switches, last, opened = set(), set(), 0, None, collections.Counter()

def profile(frame, event, argument):
    global switches, last
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith((root + "/unipic_core", root + "/nodes")):
        return
    functions.add((code.co_filename, code.co_qualname))
    files.add(code.co_filename)
    switches += last is not None and last != code.co_filename
    last = code.co_filename

def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".safetensors", ".bin")):
        opened[str(arguments[0])] += 1

from unipic_core.cli import main
sys.addaudithook(audit)
sys.setprofile(profile)
code = main(arguments)
sys.setprofile(None)
print(json.dumps({"code": code, "functions": len(functions), "files": len(files), "switches": switches,
                  "opened": dict(opened)}))
"""


def traced(folder: Path, arguments: list[str]) -> dict[str, object]:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out:
        common = ["--steps", "2", "--size", "64x64", "--device", "cpu", "--out", f"{out}/out.png"]
        command = [sys.executable, "-c", TRACE, str(folder), *arguments, *common]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="another checkout")
    args = parser.parse_args()
    pictures = [str(PICTURES / f"{name}.png") for name in ("man-office-worker", "tent", "desert")]
    compose = ["compose", *pictures, "--prompt", "The tent from image 2 in image 3"]
    for folder in (ROOT, *([args.folder.resolve()] if args.folder else [])):
        path = traced(folder, compose)
        print(f"{folder.name}: {path['functions']} functions, {path['files']} files, {path['switches']} switches")
        opened = traced(folder, [*compose, "--model", str(TINY), "--lora", str(LORA)])["opened"]
        print(f"{folder.name}: weight files opened with a LoRA: {json.dumps(opened, indent=1)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
