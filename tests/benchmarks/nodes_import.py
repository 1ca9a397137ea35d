"""How long the pack adds to ComfyUI's start: python tests/benchmarks/nodes_import.py  (needs COMFYUI_PATH)

Everything that ComfyUI has imported by itself when it comes to custom nodes is imported first; then the pack is loaded
by path, its entry point is called and every schema is made, as ComfyUI does. Each run is a process of its own; the
first, which compiles and may have to read files from the disk, is left out. Prints the median and the limit of 0.3 s.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 0.3

CODE = """
import asyncio, gc, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import comfyui
comfyui.prepare(comfyui.comfyui_path(), Path(sys.argv[2]))
import nodes, comfy.sd, comfy.samplers, comfy.text_encoders.qwen_image, latent_preview, node_helpers
from comfy_api.latest import ComfyExtension, io
gc.collect()  # else it may fall due in the middle, for torch's objects
cpu, wall = time.process_time(), time.perf_counter()
pack = comfyui.load_pack()
extension = asyncio.run(pack.comfy_entrypoint())
for node in asyncio.run(extension.get_node_list()):
    node.GET_SCHEMA()
print(time.process_time() - cpu, time.perf_counter() - wall)
"""


def measure(compiled: str) -> tuple[float, float]:
    """(seconds of CPU, seconds of wall clock) of one load in a fresh process. compiled: folder of its bytecode."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as base:
        command = [sys.executable, "-c", CODE, str(HERE.parent / "nodes"), base]
        env["PYTHONPYCACHEPREFIX"] = compiled
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    cpu, wall = map(float, done.stdout.split()[-2:])
    return cpu, wall


def main(runs: int = 5) -> int:
    with tempfile.TemporaryDirectory() as compiled:
        measure(compiled)
        cpu, wall = (
            statistics.median(values) for values in zip(*(measure(compiled) for _ in range(runs)), strict=True)
        )
    print(f"import of the pack: {cpu:.3f} s of CPU, {wall:.3f} s by the clock; the limit is {LIMIT} s")
    return int(min(cpu, wall) > LIMIT)


if __name__ == "__main__":
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("set COMFYUI_PATH to a ComfyUI checkout")
    sys.exit(main())
