"""What can go wrong in a graph: the node that is to blame says it in one sentence, and the next run works."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import pytest
import torch
from PIL import Image
from running import Executor, Graph, node_of, saved_pictures
from safetensors.torch import load_file, save_file
from unipic_pack.nodes.host import composition
from unipic_pack.nodes.host import model_paths as sources
from unipic_pack.workflows import build

torch.set_num_threads(1)

Change = Callable[[Graph], None]


@pytest.fixture(scope="module")
def executor() -> Executor:
    return Executor()


def good(seed: int) -> Graph:
    graph = build.two_references().api()
    node_of(graph, "FewStepSampler").update(seed=seed, steps=2)
    return graph


def with_node(graph: Graph, kind: str, **inputs: Any) -> list[Any]:
    """A wire from the first output of a new node."""
    name = f"new-{len(graph)}"
    graph[name] = {"class_type": kind, "inputs": inputs}
    return [name, 0]


def with_lora(graph: Graph, name: str) -> None:
    sampler = node_of(graph, "FewStepSampler")
    sampler["model"] = with_node(graph, "DistillLoRA", model=sampler["model"], lora=name, strength=1.0)


def save_lora(name: str, layer: str, width: int) -> str:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    factors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    save_file(factors, folder / name)
    folder_paths.filename_list_cache.pop("loras", None)
    return name


def corrupt_model(graph: Graph) -> None:
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"\x00" * 64)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    node_of(graph, "LoadUniPic")["model"] = "broken.safetensors"


def nan_model(graph: Graph) -> None:
    nano = sources.find_model(sources.DEFAULT_MODEL)
    folder = Path(folder_paths.models_dir) / "unipic" / "nan"
    shutil.copytree(nano, folder, dirs_exist_ok=True)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] = torch.full_like(weights["proj_out.weight"], torch.nan)
    save_file(weights, file)
    node_of(graph, "LoadUniPic")["model"] = "unipic/nan"


def seventh(graph: Graph) -> None:
    images = node_of(graph, "MultiImageCompose")
    images["images.image_7"] = images["images.image_1"]


def batches(graph: Graph) -> None:
    """Two sockets with a batch of four pictures each: eight references."""
    images = node_of(graph, "MultiImageCompose")
    for socket in ("images.image_1", "images.image_2"):
        images[socket] = with_node(graph, "RepeatImageBatch", image=images[socket], amount=4)
    images["batches"] = "all"


def too_large(graph: Graph) -> None:
    node_of(graph, "MultiImageCompose")["width"] = 1024


def lora_of_another_model(graph: Graph) -> None:
    with_lora(graph, save_lora("flux.safetensors", "transformer.single_transformer_blocks.0.attn.to_q", 64))


def lora_of_another_size(graph: Graph) -> None:
    with_lora(graph, save_lora("large.safetensors", "transformer.transformer_blocks.0.attn.to_q", 3072))


BAD: dict[str, tuple[Change, str, str]] = {
    "a seventh socket": (seventh, "MultiImageCompose", "at most 6 pictures"),
    "eight pictures in batches": (batches, "MultiImageCompose", "at most 6 pictures"),
    "a size over the budget": (too_large, "MultiImageCompose", "over this model's 256x256"),
    "an unknown checkpoint": (
        lambda graph: node_of(graph, "LoadUniPic").update(model="unipic/none"),
        "LoadUniPic",
        "there is no model 'unipic/none'",
    ),
    "a corrupt file": (corrupt_model, "LoadUniPic", "broken.safetensors"),
    "weights with NaN": (nan_model, "LoadUniPic", "not a number|NaN|not finite"),
    "a LoRA of another model": (lora_of_another_model, "DistillLoRA", "none of"),
    "a LoRA of another size": (lora_of_another_size, "DistillLoRA", "3072"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_node_says_it_and_the_next_run_works(executor: Executor, case: str) -> None:
    change, node, words = BAD[case]
    graph = good(seed=100)
    change(graph)
    done = executor.run(graph)
    assert not done.success
    assert done.error["node_type"] == node
    message = done.error["exception_message"].strip()
    assert re.search(words, message), message
    assert "\n" not in message
    assert len(message) < 500
    after = executor.run(good(seed=200 + list(BAD).index(case)))
    assert after.success, after.error.get("exception_message")


def rgba(graph: Graph) -> None:
    images = node_of(graph, "MultiImageCompose")
    mask = with_node(graph, "SolidMask", value=0.5, width=40, height=24)
    picture = images["images.image_1"]
    images["images.image_1"] = with_node(graph, "JoinImageWithAlpha", image=picture, alpha=mask)
    images["masks.mask_2"] = mask


def one_pixel(graph: Graph) -> None:
    images = node_of(graph, "MultiImageCompose")
    size = {"upscale_method": "bilinear", "width": 1, "height": 1, "crop": "disabled"}
    images["images.image_2"] = with_node(graph, "ImageScale", image=images["images.image_2"], **size)


def three_in_a_batch(graph: Graph) -> None:
    images = node_of(graph, "MultiImageCompose")
    images["images.image_1"] = with_node(graph, "RepeatImageBatch", image=images["images.image_1"], amount=3)
    images["batches"] = "all"


UNUSUAL: dict[str, Change] = {
    "RGBA and a mask of another size": rgba,
    "one pixel": one_pixel,
    "three pictures in one socket": three_in_a_batch,
    "an empty prompt": lambda graph: node_of(graph, "MultiImageCompose").update(prompt=""),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_input_works(executor: Executor, case: str) -> None:
    graph = good(seed=300)
    UNUSUAL[case](graph)
    done = executor.run(graph)
    assert done.success, done.error.get("exception_message")


def test_interrupted_while_encoding(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user presses stop while a reference is encoded: nothing half-encoded is cached, and the next run works."""
    encode = composition.encode_prompt

    def stopped(*args: Any) -> Any:
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()
        return encode(*args)

    graph = good(seed=400)
    node_of(graph, "MultiImageCompose")["prompt"] = "Show the panda on the left."
    with monkeypatch.context() as patch:
        patch.setattr(composition, "encode_prompt", stopped)
        done = executor.run(graph)
    assert not done.success
    assert not done.error  # an interruption is no error
    done = executor.run(graph)
    assert done.success, done.error.get("exception_message")


def test_model_unloaded_between_runs(executor: Executor) -> None:
    """ComfyUI frees the model; the next run loads it again and makes the same picture."""
    saved = []
    graph = good(seed=502)
    for name in ("a", "b"):
        node_of(graph, "SaveImage")["filename_prefix"] = f"unloaded-{name}"
        done = executor.run(json.loads(json.dumps(graph)))
        [entry] = saved_pictures(done.outputs)
        saved.append((Path(folder_paths.get_output_directory()) / entry["subfolder"] / entry["filename"]).read_bytes())
        management.unload_all_models()
        executor.executor.reset()  # forget the sampler's cached result too
    first, second = saved
    assert _pixels(first) == _pixels(second)


def _pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
