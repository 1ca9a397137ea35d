"""The nodes' cost inside ComfyUI: python tests/benchmarks/nodes.py [--json FILE]  (needs COMFYUI_PATH)

1. A picture by our nodes against one by `UniPicPipeline`: the nano, three references, 20 steps and the decoder, in
   turns in one process, a new seed each time, so both keep their encodings. The limit is 1.05.
2. Six references through our nodes (one shared megapixel) against six by stock encoding (a megapixel each): one step of
   a network of the nano's width and two layers at 4,096 target tokens. Times in turns in one process; peak memory of a
   process each, beyond what it held before the step (read from /proc, so on Linux).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Run, in_turns, peak_added, write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 1.05
NAMES = ("astronaut", "guitar", "beach")
PROMPT = "Put the guitar from image 2 in the hands of the astronaut from image 1, on the beach of image 3."
MEGAPIXEL, SIX = (1024, 1024), 6
LAYERS = 2


def compared(first: Run, second: Run, runs: int) -> dict[str, float]:
    """Median seconds of each, and the median of the ratios of neighbours."""
    times = in_turns({"first": first, "second": second}, runs)
    return {**{name: times.median(name) for name in times.seconds}, "ratio": times.ratio("first", "second")}


def nodes_against_pipeline(runs: int) -> dict[str, float]:
    import torch
    from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
    from unipic_pack.nodes.host.model_paths import DEFAULT_MODEL, find_model
    from unipic_pack.nodes.host.pictures.images import to_image
    from unipic_pack.nodes.load import LoadUniPic
    from unipic_pack.nodes.sample import FewStepSampler
    from unipic_pack.nodes.sample_images import FOLDER
    from unipic_pack.unipic_core.conditioning.images import load_image

    sys.path.append(str(ROOT))
    from unipic_core.pipeline import UniPicPipeline

    pictures = [load_image(FOLDER / f"{name}.png") for name in NAMES]
    model, clip, vae = LoadUniPic.execute(DEFAULT_MODEL, "auto", "auto", "as stored").result
    pipeline = UniPicPipeline.from_pretrained(find_model(DEFAULT_MODEL), torch_dtype=torch.float32, device="cpu")
    images = {name: to_image(picture) for name, picture in zip(IMAGES, pictures, strict=False)}

    seeds, own_seeds = itertools.count(), itertools.count()

    def by_nodes() -> None:
        seed = next(seeds)
        with torch.inference_mode():
            positive, negative, latent, _ = MultiImageCompose.execute(clip, vae, PROMPT, images=images).result
            made = FewStepSampler.execute(model, positive, negative, latent, seed, 20, 1.0, "euler", 1.0).result[0]
            vae.decode(made["samples"])

    def by_pipeline() -> None:
        pipeline(pictures, PROMPT, num_inference_steps=20, true_cfg_scale=1.0, sampler="euler", seed=next(own_seeds))

    return compared(by_nodes, by_pipeline, runs)


def step(shared: bool) -> Run:
    """One step at 4,096 target tokens, with six references of 4:3 sharing a megapixel or having one each."""
    import comfy.ops
    import torch
    from unipic_pack.nodes.host.model.mmdit import ComfyMMDiT, network_options
    from unipic_pack.nodes.host.model_paths import DEFAULT_MODEL, find_model
    from unipic_pack.unipic_core.conditioning.reference_sizes import reference_sizes
    from unipic_pack.unipic_core.weights.transformer import MMDiTConfig

    stored = json.loads((find_model(DEFAULT_MODEL) / "transformer" / "config.json").read_text())
    config = MMDiTConfig.from_dict({**stored, "num_layers": LAYERS})
    torch.manual_seed(0)
    network = ComfyMMDiT(operations=comfy.ops.disable_weight_init, dtype=torch.float32, **network_options(config))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sizes = reference_sizes([MEGAPIXEL] * SIX) if shared else [MEGAPIXEL] * SIX
    references = [torch.randn(1, 16, 1, h // 8, w // 8) for w, h in sizes]
    x = torch.randn(1, 16, 1, MEGAPIXEL[1] // 8, MEGAPIXEL[0] // 8)
    text = torch.randn(1, 1070 if shared else 6 * 196 + 100, config.joint_attention_dim)

    def run() -> None:
        with torch.inference_mode():
            network(x, torch.tensor([0.5]), text, ref_latents=references)

    return run


def peak_bytes(shared: bool) -> int:
    """What one step adds to the largest memory of a process of its own."""
    command = [sys.executable, __file__, "--peak", "shared" if shared else "each"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


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
            print(peak_added(step(args.peak == "shared")))
            return 0
        picture = nodes_against_pipeline(args.runs)
        six = compared(step(True), step(False), max(args.runs // 3, 3))
    memory = {name: peak_bytes(name == "shared") for name in ("shared", "each")}
    print(f"a picture by nodes {picture['first']:.2f} s, by the pipeline {picture['second']:.2f} s: ", end="")
    print(f"ratio {picture['ratio']:.3f} (limit {LIMIT})")
    print(
        f"a step with six references sharing a megapixel {six['first']:.2f} s, a megapixel each {six['second']:.2f} s: "
    )
    print(f"ratio {six['ratio']:.3f}; peak memory {memory['shared'] / 1e6:.0f} MB, {memory['each'] / 1e6:.0f} MB")
    result = {"picture": picture, "six": six, "peak_bytes": memory, "machine": platform.machine()}
    write_json(args.json, {**result, "cores": os.cpu_count()})
    return int(picture["ratio"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
