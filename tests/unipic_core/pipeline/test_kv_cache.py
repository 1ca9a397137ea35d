"""The pipeline's condition cache: what is read once, and that nothing stale is ever used."""

from __future__ import annotations

import contextlib
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.prompt import LONG_PROMPT
from unipic_core.errors import UniPicError
from unipic_core.model.attention import scaled_dot_product_attention
from unipic_core.model.config import FULL, kv_cache_bytes
from unipic_core.pipeline import UniPicPipeline, loading
from unipic_core.pipeline.memory_plan import MemoryPlan, PartSizes
from unipic_core.weights.lora import save_lora
from unipic_core.weights.recipe import Recipe

CAUSAL = ("reference_causal", "prefix_causal")
RED, BLUE = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (40, 64), "blue")


def pipeline(form: str, tmp_path: Path) -> UniPicPipeline:
    """The nano's weights in another form: noise for a picture, but the same arithmetic."""
    folder = tmp_path / form
    if not folder.exists():
        shutil.copytree(DEFAULT_MODEL, folder)
        config = folder / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_form": form}))
    return UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")


def latents(pipe: UniPicPipeline, **wishes: Any) -> Tensor:
    given = {"images": [RED, BLUE], "prompt": "a cup", "seed": 1, "num_inference_steps": 2, "reference_budget": 64}
    given |= {"width": 64, "height": 48, "output_type": "latent", "true_cfg_scale": 1.0}
    return pipe(**{**given, **wishes}).images


def uncached(pipe: UniPicPipeline) -> UniPicPipeline:
    """The pipeline without condition cache: its network computes every token in every step."""
    pipe._kv_cache.get = lambda network, latents, text: {}  # type: ignore[method-assign]
    return pipe


class Prefills:
    """Counts what a pipeline's network reads before it samples."""

    def __init__(self, pipe: UniPicPipeline) -> None:
        self.network, self.original = pipe.transformer, pipe.transformer.prefill
        self.count = 0
        self.made: list[weakref.ref[Tensor]] = []
        pipe.transformer.prefill = self  # type: ignore[method-assign,assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        cache = self.original(*args, **kwargs)
        self.made += [weakref.ref(x) for pairs in cache.values() for pair in pairs for x in pair]
        return cache

    def since(self) -> int:
        count, self.count = self.count, 0
        return count

    def held(self) -> int:
        """How many of the tensors that it gave are still in memory."""
        return sum(tensor() is not None for tensor in self.made)


@pytest.mark.parametrize("form", CAUSAL)
def test_read_once_and_never_stale(form: str, tmp_path: Path) -> None:
    """A run that keeps what it can gives what a run gives that keeps nothing at all."""
    pipe, texts = pipeline(form, tmp_path), int(form == "prefix_causal")
    prefills, fresh = Prefills(pipe), uncached(pipeline(form, tmp_path))
    for wishes, read in (
        ({}, 1 + texts),
        ({"seed": 2, "num_images": 2}, 0),
        ({"num_inference_steps": 3, "sampler": "consistency"}, 0),
        ({"prompt": "a hat"}, texts),
        ({"true_cfg_scale": 3.0}, texts),  # the prompt is there still
        ({"images": [BLUE, RED]}, 1 + texts),
        ({"images": [RED]}, 1 + texts),
        ({"images": [RED], "width": 128}, texts),  # the text starts behind half the largest side
        ({"images": [RED], "width": 96, "height": 128}, 0),
    ):
        got = latents(pipe, **wishes)
        assert prefills.since() == read, wishes
        fresh.clear_cache()
        assert float((got - latents(fresh, **wishes)).abs().max()) < 1e-5, wishes


@pytest.mark.parametrize("form", CAUSAL)
def test_another_attention_function_is_noticed(form: str, tmp_path: Path) -> None:
    def halved(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask) / 2

    pipe, fresh = pipeline(form, tmp_path), uncached(pipeline(form, tmp_path))
    before = latents(pipe)
    pipe.transformer.attention = fresh.transformer.attention = halved
    got = latents(pipe)
    assert float((got - latents(fresh)).abs().max()) < 1e-5
    assert float((got - before).abs().max()) > 1e-2


@pytest.mark.parametrize("form", CAUSAL)
def test_offloading_frees_the_conditions(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the VAE comes to the device, and when the run is interrupted."""
    pipe = pipeline(form, tmp_path)
    prefills, decode, held = Prefills(pipe), pipe.vae.decode, []

    def look(z: Tensor) -> Tensor:
        held.append(prefills.held())
        return decode(z)

    def interrupt(*_: Any) -> None:
        held.append(prefills.held())
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vae, "decode", look)
    monkeypatch.setattr(pipe.placement, "offload", True)
    latents(pipe, output_type="pt")
    assert held == [0] < [len(prefills.made)]
    with contextlib.suppress(KeyboardInterrupt):
        latents(pipe, callback=interrupt)
    assert held[1] > prefills.held() == 0
    monkeypatch.setattr(pipe.placement, "offload", False)
    latents(pipe, output_type="pt")
    assert held[2] == prefills.held() > 0, "without offloading they serve the next run"


@pytest.mark.parametrize("form", CAUSAL)
def test_what_is_kept_counts_when_offloading_is_decided(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    counted: list[PartSizes] = []
    monkeypatch.setattr(loading, "plan_memory", lambda device, sizes: counted.append(sizes) or MemoryPlan())
    pipe, folder = pipeline(form, tmp_path), tmp_path / form
    prefills, config = Prefills(pipe), pipe.transformer.config
    for prompt in ("a cup", "a hat"):
        latents(pipe, images=[RED.resize((64, 64))], prompt=prompt, reference_budget=None)
    kept = sum(tensor.nbytes for made in prefills.made if (tensor := made()) is not None)
    parts = counted.pop()
    said = parts.kv_cache
    words = 2 * LONG_PROMPT * kv_cache_bytes(1, config.num_layers, config.width, 4) if form == "prefix_causal" else 0
    assert kept <= said <= kept + words
    shutil.copy(DEFAULT_MODEL / "transformer" / "config.json", folder / "transformer")
    for asked, bytes_kept in ((FULL, 0), (form, said)):
        recipe = json.loads((DEFAULT_MODEL / "recipe.json").read_text()) | {"attention_form": asked}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")
        assert counted.pop() == replace(parts, kv_cache=bytes_kept)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("form", CAUSAL)
def test_a_lora_in_and_out(form: str, inference: bool, tmp_path: Path) -> None:
    """Weights that change are noticed, even inference tensors, which do not say so; the LoRA's form comes with it."""
    generator = torch.Generator().manual_seed(0)
    layer = "transformer_blocks.0.attn.to_v"
    pairs = {layer: (torch.randn(2, 160, generator=generator), torch.randn(160, 2, generator=generator))}
    save_lora(tmp_path / "causal.safetensors", pairs, recipe=Recipe(attention_form=form))

    with torch.inference_mode(inference):
        full, causal = pipeline(FULL, tmp_path), pipeline(form, tmp_path)
        plain, own = latents(full), latents(causal)
        for pipe in (full, causal):
            pipe.load_lora(tmp_path / "causal.safetensors")
            assert pipe.transformer.config.attention_form == form
        prefills = Prefills(causal)
        assert torch.equal(latents(full), latents(causal))
    assert prefills.since() > 0, "the weights are others now"
    for pipe, form_before, before in ((full, FULL, plain), (causal, form, own)):
        pipe.load_lora(tmp_path / "causal.safetensors", -1.0)
        assert pipe.transformer.config.attention_form == form_before
        assert float((latents(pipe) - before).abs().max()) < 1e-4
    assert prefills.since() > 0, "the weights are what they were"


def test_a_lora_of_an_unknown_form_changes_nothing(tmp_path: Path) -> None:
    pipe = pipeline(FULL, tmp_path)
    layer = "transformer_blocks.0.attn.to_v"
    save_lora(
        tmp_path / "new.safetensors",
        {layer: (torch.ones(1, 160), torch.ones(160, 1))},
        recipe=Recipe(attention_form="some_causal"),
    )
    before = pipe.transformer.get_parameter(f"{layer}.weight").clone()
    with pytest.raises(UniPicError, match="expected the attention form .* got .some_causal."):
        pipe.load_lora(tmp_path / "new.safetensors")
    assert pipe.recipe == pipe.base_recipe
    assert torch.equal(pipe.transformer.get_parameter(f"{layer}.weight"), before)
