"""The nodes' cost inside ComfyUI: python tests/benchmarks/nodes.py [--json FILE]  (needs COMFYUI_PATH)

1. A picture by our nodes against one by `UniPicPipeline`: the nano, three references, 20 steps and the decoder, in
   turns in one process, a new seed each time, so both keep their encodings. The limit is 1.05.
2. Six references through our nodes (one shared megapixel) against six by stock encoding (a megapixel each): one step of
   a network of the nano's width and two layers at 4,096 target tokens. Times in turns in one process; peak memory of a
   process each, beyond what it held before the step (read from /proc, so on Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 1.05
NAMES = ("astronaut", "guitar", "beach")
PROMPT = "Put the guitar from image 2 in the hands of the astronaut from image 1, on the beach of image 3."
MEGAPIXEL, SIX = (1024, 1024), 6
LAYERS = 2


def in_turns(first: Callable[[int], Any], second: Callable[[int], Any], runs: int) -> dict[str, float]:
    """Median seconds of each, and the median of the ratios of neighbours. The first round is left out."""
    times: list[tuple[float, float]] = []
    for i in range(runs + 1):
        both = []
        for function in (first, second):
            start = time.perf_counter()
            function(i)
            both.append(time.perf_counter() - start)
        times.append((both[0], both[1]))
    times = times[1:]
    return {
        "first": statistics.median(a for a, _ in times),
        "second": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
    }


def nodes_against_pipeline(runs: int) -> dict[str, float]:
    import torch
    from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
    from unipic_pack.nodes.load import LoadUniPic
    from unipic_pack.nodes.pictures import FOLDER, to_image
    from unipic_pack.nodes.sample import FewStepSampler
    from unipic_pack.nodes.sources import DEFAULT_MODEL, find_model
    from unipic_pack.unipic_core.images import load_image

    sys.path.append(str(ROOT))
    from unipic_core.pipeline import UniPicPipeline

    pictures = [load_image(FOLDER / f"{name}.png") for name in NAMES]
    model, clip, vae = LoadUniPic.execute(DEFAULT_MODEL, "auto", "auto", "as stored").result
    pipeline = UniPicPipeline.from_pretrained(find_model(DEFAULT_MODEL), torch_dtype=torch.float32, device="cpu")
    images = {name: to_image(picture) for name, picture in zip(IMAGES, pictures, strict=False)}

    def by_nodes(seed: int) -> None:
        with torch.inference_mode():
            positive, negative, latent = MultiImageCompose.execute(clip, vae, PROMPT, images=images).result
            made = FewStepSampler.execute(model, positive, negative, latent, seed, 20, 1.0, "euler", 1.0).result[0]
            vae.decode(made["samples"])

    def by_pipeline(seed: int) -> None:
        pipeline(pictures, PROMPT, num_inference_steps=20, true_cfg_scale=1.0, sampler="euler", seed=seed)

    return in_turns(by_nodes, by_pipeline, runs)


def step(shared: bool) -> Callable[[int], Any]:
    """One step at 4,096 target tokens, with six references of 4:3 sharing a megapixel or having one each."""
    import comfy.ops
    import torch
    from unipic_pack.nodes.network import Network, network_options
    from unipic_pack.nodes.sources import DEFAULT_MODEL, find_model
    from unipic_pack.unipic_core.checkpoints import MMDiTConfig
    from unipic_pack.unipic_core.images import reference_sizes

    stored = json.loads((find_model(DEFAULT_MODEL) / "transformer" / "config.json").read_text())
    config = MMDiTConfig.from_dict({**stored, "num_layers": LAYERS})
    torch.manual_seed(0)
    network = Network(operations=comfy.ops.disable_weight_init, dtype=torch.float32, **network_options(config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sizes = reference_sizes([MEGAPIXEL] * SIX) if shared else [MEGAPIXEL] * SIX
    references = [torch.randn(1, 16, 1, h // 8, w // 8) for w, h in sizes]
    x = torch.randn(1, 16, 1, MEGAPIXEL[1] // 8, MEGAPIXEL[0] // 8)
    text = torch.randn(1, 1070 if shared else 6 * 196 + 100, config.joint_attention_dim)

    def run(_: int) -> None:
        with torch.inference_mode():
            network(x, torch.tensor([0.5]), text, ref_latents=references)

    return run


def peak_bytes(shared: bool) -> int:
    """What one step adds to the largest memory of a process of its own."""
    command = [sys.executable, __file__, "--peak", "shared" if shared else "each"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak(shared: bool) -> None:
    run = step(shared)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the largest memory so far
    before = _status("VmRSS")
    run(0)
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=["shared", "each"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "nodes"))
    import comfyui

    path = comfyui.comfyui_path()
    if path is None:
        print("set COMFYUI_PATH to a ComfyUI checkout", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as base:
        comfyui.prepare(path, Path(base))
        comfyui.load_pack()
        if args.peak:
            print_peak(args.peak == "shared")
            return 0
        picture = nodes_against_pipeline(args.runs)
        six = in_turns(step(True), step(False), max(args.runs // 3, 3))
    memory = {name: peak_bytes(name == "shared") for name in ("shared", "each")}
    print(f"a picture by nodes {picture['first']:.2f} s, by the pipeline {picture['second']:.2f} s: ", end="")
    print(f"ratio {picture['ratio']:.3f} (limit {LIMIT})")
    print(
        f"a step with six references sharing a megapixel {six['first']:.2f} s, a megapixel each {six['second']:.2f} s: "
    )
    print(f"ratio {six['ratio']:.3f}; peak memory {memory['shared'] / 1e6:.0f} MB, {memory['each'] / 1e6:.0f} MB")
    if args.json:
        result = {"picture": picture, "six": six, "peak_bytes": memory, "machine": platform.machine()}
        args.json.write_text(json.dumps({**result, "cores": os.cpu_count()}, indent=1) + "\n")
    return int(picture["ratio"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
