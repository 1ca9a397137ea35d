"""Make the fixtures of this folder with an earlier version: in a checkout of that version, `python make.py FOLDER`.

They were made at commit 94e8c10, whose module names this file uses; never make them again with a later version.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
PROGRAMS = (
    *("unipic_core", "unipic_core compose", "unipic_core info", "unipic_core convert", "unipic_core merge"),
    *(f"trainers.{name}" for name in ("train", "cache", "evaluate", "memory", "extract", "curves", "nano")),
    "trainers.data.emoji",
)
TINY = Path("tests/golden/tiny")


def options() -> dict[str, list[str]]:
    found = {}
    for program in PROGRAMS:
        command = [sys.executable, "-m", *program.split(), "--help"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[program] = sorted(set(OPTION.findall(text)))
    return found


def digests(path: Path) -> dict[str, str]:
    from unipic_core.checkpoints import load_transformer

    return digests_of(load_transformer(path, dtype=torch.float32).state_dict())


def digests_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16] for name, x in tensors.items()}


def small_network(folder: Path) -> Path:
    """The tiny network without its second block."""
    folder.mkdir()
    config = json.loads((TINY / "transformer" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    weights = load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {name: x for name, x in weights.items() if not name.startswith("transformer_blocks.1.")}
    save_file(kept, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def write_weights(out: Path, scratch: Path) -> None:
    from unipic_core.convert import convert
    from unipic_core.lora import read_lora, save_lora
    from unipic_core.merge import merge
    from unipic_core.recipe import Recipe, recipe_of

    out.mkdir()
    source, g = small_network(scratch / "transformer"), torch.Generator().manual_seed(1)
    weights = load_file(source / "diffusion_pytorch_model.safetensors")
    names = ("img_in", "transformer_blocks.0.attn.to_q")
    shapes = {name: weights[f"{name}.weight"].shape for name in names}
    draw = lambda *size: (torch.randn(size, generator=g) * 0.1).bfloat16()  # noqa: E731
    pairs = {name: (draw(2, shape[1]), draw(shape[0], 2)) for name, shape in shapes.items()}
    recipe = Recipe(steps=4, guidance=1.0, sampler="consistency", made={"by": "dmd"})
    save_lora(out / "lora.safetensors", pairs, recipe=recipe)
    convert(source, out / "converted.safetensors", dtype="fp8_scaled")
    merge(source, out / "merged.safetensors", [(out / "lora.safetensors", 0.5)], dtype="fp8_scaled")
    expected = {name: digests(out / f"{name}.safetensors") for name in ("converted", "merged")}
    expected["lora"] = digests_of({k: x.float() for k, x in load_file(out / "lora.safetensors").items()})
    recipes = {name: vars(recipe_of(out / f"{name}.safetensors")) for name in ("converted", "merged")}
    recipes["lora"] = vars(read_lora(out / "lora.safetensors").recipe)
    (out / "expected.json").write_text(json.dumps({"tensors": expected, "recipes": recipes}, indent=1, default=str))


def write_training(out: Path) -> None:
    """A cache and a run of two steps, whose paths begin at the checkout."""
    place = Path("tests/compat/fixtures/training")
    place.mkdir(parents=True)
    rows = []
    for i in range(4):
        for j, name in enumerate("rt"):
            Image.new("RGB", (64, 64), (60 * i, 200 * j, 90)).save(place / f"{name}{i}.png")
        rows.append({"input_images": [f"r{i}.png"], "instruction": f"row {i}", "output_image": f"t{i}.png"})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "method": "sft",
        "output": f"{place}/run",
        "steps": 2,
        "batch_size": 2,
        "save_every": 2,
        "sample_every": 100,
        "log_every": 1,
        "network": {"model": str(TINY), "adapter": {"rank": 1, "targets": ["to_q"]}},
        "data": {
            "folder": f"{place}/cache",
            "kind": "jsonl",
            "path": f"{place}/rows.jsonl",
            "size": 64,
            "reference_budget": 64,
            "samples_per_shard": 4,
            "workers": 0,
        },
        "preview": {"samples": 1, "steps": 1},
    }
    (place / "config.yaml").write_text(json.dumps(config, indent=1))
    for program in ("cache", "train"):
        subprocess.run([sys.executable, "-m", f"trainers.{program}", str(place / "config.yaml")], check=True)
    shutil.copytree(place, out)
    for path in (out / "run").iterdir():
        if path.name not in ("checkpoints", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    from trainers.config import load_config, to_dict

    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    shutil.copytree("workflows", out / "workflows", ignore=lambda _, names: [n for n in names if ".json" not in n])
    shutil.copytree("trainers/configs", out / "configs")
    values = {path.name: to_dict(load_config(path)) for path in sorted(Path("trainers/configs").glob("*.yaml"))}
    (out / "configs.json").write_text(json.dumps(values, indent=1))
    (out / "options.json").write_text(json.dumps(options(), indent=1))
    schemas = subprocess.run([sys.executable, "tests/nodes/schemas.py"], check=True, capture_output=True, text=True)
    (out / "schemas.json").write_text(json.dumps(json.loads(schemas.stdout), indent=1))
    with tempfile.TemporaryDirectory() as scratch:
        write_weights(out / "weights", Path(scratch))
        write_training(out / "training")


if __name__ == "__main__":
    main()
