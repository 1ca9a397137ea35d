"""Causal attention forms inside ComfyUI: the core's numbers, the kv cache of a run, and that nothing stale is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import pytest
import torch
import toy
from causal_tools import CAUSAL, STEPS, build, cached_sets, close, conditioning, run
from model_tools import lora_file, random_inputs, velocity
from torch import Tensor
from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
from unipic_pack.nodes.host.model import kv_cache
from unipic_pack.nodes.host.model.kv_cache import ATTENTION_FORM, KV_CACHE
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.model.mmdit import ComfyMMDiT
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.host.pictures.vae import load_vae
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.host.text.encoder import load_clip
from unipic_pack.nodes.lora import add_lora, switch_attention_form
from unipic_pack.nodes.sample_images import FOLDER
from unipic_pack.unipic_core.conditioning.images import load_image
from unipic_pack.unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_pack.unipic_core.errors import LoRAError, UniPicError
from unipic_pack.unipic_core.model.config import REFERENCES, TEXT
from unipic_pack.unipic_core.run.kv_cache import REUSE_WITHIN
from unipic_pack.unipic_core.weights.recipe import Recipe
from unipic_pack.unipic_core.weights.transformer import load_transformer

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed before the target's segment, in order."""
    prefilled: list[str] = []
    original = ComfyMMDiT._segment

    def watched(self: ComfyMMDiT, piece: str, inputs: Any) -> Any:
        prefilled.append(f"{piece} x{inputs.rows[piece]}")
        return original(self, piece, inputs)

    monkeypatch.setattr(ComfyMMDiT, "_segment", watched)
    return prefilled


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("count", [0, 2])
def test_as_the_core_computes_it(
    form: str, count: int, causal_folders: dict[str, Path], causal_models: dict[str, Any]
) -> None:
    x, text, references = random_inputs()
    network = load_transformer(causal_folders[form], dtype=torch.float32)
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references[:count]])
    want = unpack_latents(network(packed, 0.7, TextCond(text)), LatentShape(1, 4, 4))
    got = velocity(causal_models[form], x, 0.7, text, references[:count])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", CAUSAL)
def test_padded_text_gives_what_it_gives_alone(form: str, causal_models: dict[str, Any]) -> None:
    x, text, references = random_inputs()
    text[:, 6:] = 50.0
    mask = torch.tensor([[1] * 6 + [0] * 3])
    got = velocity(causal_models[form], x, 0.4, text, references, attention_mask=mask)
    torch.testing.assert_close(got, velocity(causal_models[form], x, 0.4, text[:, :6], references), rtol=0, atol=2e-5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("form", CAUSAL)
def test_a_run_reads_its_condition_once(
    form: str, cfg: float, causal_models: dict[str, Any], prefills: list[str]
) -> None:
    model = causal_models[form]
    cached = run(model, cfg=cfg)
    texts = 0 if form == "reference_causal" else 1 if cfg == 1 else 2
    assert prefills.count(f"{REFERENCES} x1") == 1
    assert prefills.count(f"{TEXT} x1") == texts
    assert cached_sets(model) == {REFERENCES: 0, TEXT: 0}, "freed when the run ends"
    prefills.clear()
    close(run(model, "off", cfg), cached)
    passes = STEPS * (1 if cfg == 1 else 2)
    assert prefills.count(f"{REFERENCES} x1") == passes


@pytest.mark.parametrize("form", CAUSAL)
def test_a_batch_of_seeds_shares_one_condition(form: str, causal_models: dict[str, Any], prefills: list[str]) -> None:
    two = run(causal_models[form], batch=2)
    assert {"references x1"} <= set(prefills) <= {"references x1", "text x1"}
    assert float((two[0] - two[1]).abs().max()) > 0.1
    close(run(causal_models[form], "off", batch=2), two)


@pytest.mark.parametrize("form", CAUSAL)
def test_nothing_stale(form: str, causal_models: dict[str, Any], causal_folders: dict[str, Path]) -> None:
    """Another prompt, other references, another LoRA, another model of the same network: each as without the cache."""
    _, text, references = random_inputs()
    other = load_model(causal_folders[form])
    changed = add_lora(causal_models[form], build(lora_file("transformer.{}.lora_{}.weight")), 1.0)[0]
    seen = []
    for model, changes in (
        (causal_models[form], {}),
        (causal_models[form], {"text": text.flip(-1)}),
        (causal_models[form], {"references": [references[0] + 1, references[1]]}),
        (causal_models[form], {"references": [references[1], references[0]]}),
        (changed, {}),
        (causal_models[form], {}),
        (other, {}),
    ):
        cached = run(model, **changes)
        close(run(model, "off", **changes), cached)
        seen.append(cached)
    differ = [float((a - seen[0]).abs().max()) > 0.01 for a in seen]
    assert differ == [False, True, True, True, True, False, False]


@pytest.mark.parametrize("form", CAUSAL)
def test_a_causal_lora_switches_the_form(form: str, nano: Path, causal_folders: dict[str, Path]) -> None:
    """As the same LoRA on weights that have the form; the model that it came to stays what it was."""
    full, causal = load_model(nano), load_model(causal_folders[form])
    tensors = lora_file("transformer.{}.lora_{}.weight")
    switched = add_lora(full, build(tensors, Recipe(attention_form=form)), 1.0)[0]
    assert attachment_of(switched).recipe.causal_attention_form == form
    before = run(full)
    close(run(switched), run(add_lora(causal, build(tensors), 1.0)[0]))
    close(run(full), before)


def test_a_causal_lora_is_refused_by_another_network() -> None:
    model = toy.model()
    with pytest.raises(LoRAError, match="which ComfyUI's own Qwen-Image network does not have; load the model with"):
        switch_attention_form(model, "test.safetensors", "prefix_causal")


@pytest.fixture
def opened(causal_models: dict[str, Any]) -> Iterator[Any]:
    model = causal_models["prefix_causal"]
    network = model.model.diffusion_model
    network.kv_cache.begin_run(model)
    yield model
    network.kv_cache.end_run()


def test_hooks_on_weights_and_the_switch_cache_nothing(opened: Any, prefills: list[str]) -> None:
    x, text, references = random_inputs()
    for _ in range(2):
        velocity(opened, x, 0.5, text, references)
    assert len(prefills) == 2
    assert cached_sets(opened) == {REFERENCES: 1, TEXT: 1}
    velocity(opened, x, 0.5, text, references, transformer_options={KV_CACHE: "off"})
    opened.model.diffusion_model.kv_cache.begin_run(SimpleNamespace(hook_patches={"some": {}}))
    velocity(opened, x, 0.5, text, references)
    assert len(prefills) == 6
    assert cached_sets(opened) == {REFERENCES: 0, TEXT: 0}


def test_what_is_kept_is_bounded(opened: Any) -> None:
    x, text, references = random_inputs()
    for i in range(6):
        velocity(opened, x, 0.5, text + i, references)
    assert cached_sets(opened) == {REFERENCES: 1, TEXT: 4}


def test_a_batch_of_two_texts_keeps_its_references_once(opened: Any, prefills: list[str]) -> None:
    """ComfyUI puts cond and uncond into one batch where their texts have the same length."""
    x, text, references = random_inputs(2)
    together = velocity(opened, x, 0.5, text, references)
    assert prefills == ["references x1", "text x2"]
    for i in range(2):
        close(velocity(opened, x[i : i + 1], 0.5, text[i : i + 1], references), together[i : i + 1])


def test_off_goes_through_each_block_at_once(causal_models: dict[str, Any]) -> None:
    """So keys and values of one block are in memory and not of all; cached ones are prefilled in all blocks first."""
    model, order = causal_models["prefix_causal"], []
    blocks = model.model.diffusion_model.transformer_blocks
    hooks = [block.register_forward_hook(lambda *_, i=i: order.append(i)) for i, block in enumerate(blocks)]
    try:
        run(model, "off", steps=1)
        apart, order[:] = list(order), []
        run(model, steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert apart == [i for i in range(len(blocks)) for _ in range(3)]
    assert order == 3 * list(range(len(blocks)))


@pytest.mark.parametrize("form", CAUSAL)
def test_hooks_see_the_targets_segment(form: str, causal_models: dict[str, Any]) -> None:
    x, text, references = random_inputs()
    words = 9 if form == "reference_causal" else 0
    seen = []

    def same(args: dict, extra: dict) -> dict:
        seen.append((args["img"].shape[1], None if args["txt"] is None else args["txt"].shape[1], args["pe"].shape[2]))
        return extra["original_block"](args)

    watched = causal_models[form].clone()
    watched.set_model_patch_replace(same, "dit", "double_block", 2)
    plain = velocity(causal_models[form], x, 0.5, text, references)
    torch.testing.assert_close(velocity(watched, x, 0.5, text, references), plain, rtol=0, atol=1e-5)
    assert seen == [(16, words or None, words + 16)]


def test_form_of_the_options_goes_before_the_networks(causal_models: dict[str, Any], nano_model: Any) -> None:
    x, text, references = random_inputs()
    for form in CAUSAL:
        got = velocity(nano_model, x, 0.5, text, references, transformer_options={ATTENTION_FORM: form})
        torch.testing.assert_close(got, velocity(causal_models[form], x, 0.5, text, references), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def picture_inputs(nano: Path, nano_model: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents of a new picture, text and references of a real composition at 128 pixels."""
    pictures = {IMAGES[i]: to_image(load_image(FOLDER / f"{name}.png")) for i, name in enumerate(("panda", "beach"))}
    sizes = {"width": 128, "height": 128, "reference_budget": 128}
    clip, vae = load_clip(nano), load_vae(nano)
    [[text, extra]] = MultiImageCompose.execute(clip, vae, "the panda at the beach", images=pictures, **sizes).result[0]
    references = [nano_model.model.process_latent_in(latents) for latents in extra["reference_latents"]]
    return references[1], text, references


def test_approximate_uses_references_again_while_t_moves_little(
    nano_model: Any, prefills: list[str], picture_inputs: tuple[Tensor, Tensor, list[Tensor]]
) -> None:
    """The first call is exact; near it references are not computed; far from it they are; cond and uncond apart."""
    x0, text, references = picture_inputs
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    model = kv_cache.with_kv_cache(nano_model, kv_cache.APPROXIMATE)
    network = model.model.diffusion_model
    network.kv_cache.begin_run(model)
    sizes: list[int] = []
    hook = network.img_in.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
    try:
        near = 0.9 - 0.9 * REUSE_WITHIN
        calls = [(0.9, text), (0.9, text[:, 9:]), (near, text), (near, text[:, 9:]), (0.4, text), (0.3, text)]
        got = [velocity(model, t * eps + (1 - t) * x0, t, words, references) for t, words in calls]
    finally:
        hook.remove()
        network.kv_cache.end_run()
    target, *seen = (x.shape[-2] * x.shape[-1] // 4 for x in (x0, *references))
    everything = target + sum(seen)
    assert sizes == [everything, everything, target, target, everything, target]
    for (t, words), v, size in zip(calls, got, sizes, strict=True):
        exact = velocity(nano_model, t * eps + (1 - t) * x0, t, words, references)
        if size == everything:
            torch.testing.assert_close(v, exact, rtol=0, atol=1e-5)
        else:
            assert 1e-4 < float((v - exact).norm() / exact.norm()) < 0.3


def test_approximate_is_exact_for_a_causal_form_and_over_when_the_run_is(
    causal_models: dict[str, Any], nano: Path
) -> None:
    model = causal_models["reference_causal"]
    close(run(model, "approximate"), run(model))
    full = load_model(nano)
    assert float((run(full, "approximate", steps=6) - run(full, steps=6)).abs().max()) > 1e-3
    assert len(full.model.diffusion_model.kv_cache.approximate) == 0


def test_approximate_is_refused_by_another_network() -> None:
    with pytest.raises(UniPicError, match="approximate expects a model from Load UniPic"):
        kv_cache.with_kv_cache(toy.model(), kv_cache.APPROXIMATE)


def test_ksampler_of_comfyui_keeps_too(causal_models: dict[str, Any], prefills: list[str]) -> None:
    x, text, references = random_inputs()
    positive = conditioning(text, references)
    comfy.sample.sample(
        causal_models["prefix_causal"],
        x,
        3,
        1.0,
        "euler",
        "simple",
        positive,
        positive,
        torch.zeros_like(x),
        disable_pbar=True,
    )
    assert prefills == ["references x1", "text x1"]
