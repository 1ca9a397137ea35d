"""Causal attention forms inside ComfyUI: the core's numbers, what is kept during a run, and that nothing stale is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import pytest
import torch
import toy
from model_tools import lora_file, random_inputs, velocity
from torch import Tensor
from unipic_pack.nodes import conditions
from unipic_pack.nodes.conditions import CACHE, FORM
from unipic_pack.nodes.facts import facts_of
from unipic_pack.nodes.lora import add_lora, switch_form
from unipic_pack.nodes.model import KEPT, load_model
from unipic_pack.nodes.network import Network
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.checkpoints import load_transformer
from unipic_pack.unipic_core.conditions import REUSE_WITHIN
from unipic_pack.unipic_core.errors import LoRAError, UniPicError
from unipic_pack.unipic_core.lora import build_lora
from unipic_pack.unipic_core.recipe import Recipe
from unipic_pack.unipic_core.segments import REFERENCES, TEXT, condition_bytes
from unipic_pack.unipic_core.sequence import LatentShape, TextCond, pack_latents, pack_with_references, unpack_latents

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")
CAUSAL = ("reference_causal", "prefix_causal")
EXACT = 1e-5
STEPS = 3


@pytest.fixture(scope="module")
def folders(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The nano's weights, as if each causal form had been trained with them."""
    made = {}
    for form in CAUSAL:
        made[form] = shutil.copytree(nano, tmp_path_factory.mktemp(form) / "nano")
        config = made[form] / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_form": form}))
    return made


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {form: load_model(folder) for form, folder in folders.items()}


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is computed before the target's segment, in order."""
    made: list[str] = []
    original = Network._prefill

    def watched(self: Network, piece: str, fixed: Any, past: Any) -> Any:
        made.append(f"{piece} x{1 if fixed.alike else len(fixed.context)}")
        return original(self, piece, fixed, past)

    monkeypatch.setattr(Network, "_prefill", watched)
    return made


def conditioning(text: Tensor, references: list[Tensor]) -> list:
    return [[text, {"reference_latents": references}]]


def run(model: Any, cache: str = "auto", cfg: float = 1.0, seed: int = 3, batch: int = 1, **changes: Any) -> Tensor:
    x, text, references = random_inputs(batch)
    text, references = changes.get("text", text[:1]), changes.get("references", references)
    positive, negative = conditioning(text, references), conditioning(text[:, :4] * -0.5, references)
    empty = {"samples": torch.zeros_like(x)}
    out = FewStepSampler.execute(
        model, positive, negative, empty, seed, changes.get("steps", STEPS), cfg, "consistency", 1.0, cache
    )
    return out[0]["samples"]


def kept(model: Any) -> dict[str, int]:
    return {piece: len(cache) for piece, cache in model.model.diffusion_model.conditions.kept.items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=EXACT * float(b.abs().max().clamp_min(1)))


@pytest.mark.parametrize("form", CAUSAL)
@pytest.mark.parametrize("count", [0, 2])
def test_as_the_core_computes_it(form: str, count: int, folders: dict[str, Path], models: dict[str, Any]) -> None:
    x, text, references = random_inputs()
    network = load_transformer(folders[form], dtype=torch.float32)
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references[:count]])
    want = unpack_latents(network(packed, 0.7, TextCond(text)), LatentShape(1, 4, 4))
    got = velocity(models[form], x, 0.7, text, references[:count])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", CAUSAL)
def test_padded_text_gives_what_it_gives_alone(form: str, models: dict[str, Any]) -> None:
    x, text, references = random_inputs()
    text[:, 6:] = 50.0
    mask = torch.tensor([[1] * 6 + [0] * 3])
    got = velocity(models[form], x, 0.4, text, references, attention_mask=mask)
    torch.testing.assert_close(got, velocity(models[form], x, 0.4, text[:, :6], references), rtol=0, atol=2e-5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("form", CAUSAL)
def test_a_run_reads_its_condition_once(form: str, cfg: float, models: dict[str, Any], prefills: list[str]) -> None:
    model = models[form]
    cached = run(model, cfg=cfg)
    texts = 0 if form == "reference_causal" else 1 if cfg == 1 else 2
    assert prefills.count(f"{REFERENCES} x1") == 1
    assert prefills.count(f"{TEXT} x1") == texts
    assert kept(model) == {REFERENCES: 0, TEXT: 0}, "freed when the run ends"
    prefills.clear()
    close(run(model, "off", cfg), cached)
    passes = STEPS * (1 if cfg == 1 else 2)
    assert prefills.count(f"{REFERENCES} x1") == passes


@pytest.mark.parametrize("form", CAUSAL)
def test_a_batch_of_seeds_shares_one_condition(form: str, models: dict[str, Any], prefills: list[str]) -> None:
    two = run(models[form], batch=2)
    assert {"references x1"} <= set(prefills) <= {"references x1", "text x1"}
    assert float((two[0] - two[1]).abs().max()) > 0.1
    close(run(models[form], "off", batch=2), two)


@pytest.mark.parametrize("form", CAUSAL)
def test_nothing_stale(form: str, models: dict[str, Any], folders: dict[str, Path]) -> None:
    """Another prompt, other references, another LoRA, another model of the same network: each as without the cache."""
    _, text, references = random_inputs()
    other = load_model(folders[form])
    changed = add_lora(models[form], build(lora_file("transformer.{}.lora_{}.weight")), 1.0)[0]
    seen = []
    for model, changes in (
        (models[form], {}),
        (models[form], {"text": text.flip(-1)}),
        (models[form], {"references": [references[0] + 1, references[1]]}),
        (models[form], {"references": [references[1], references[0]]}),
        (changed, {}),
        (models[form], {}),
        (other, {}),
    ):
        cached = run(model, **changes)
        close(run(model, "off", **changes), cached)
        seen.append(cached)
    differ = [float((a - seen[0]).abs().max()) > 0.01 for a in seen]
    assert differ == [False, True, True, True, True, False, False]


def build(tensors: dict[str, Tensor], recipe: Recipe | None = None) -> Any:
    return build_lora(tensors, tensors.__getitem__, Path("test.safetensors"), {}, recipe)


@pytest.mark.parametrize("form", CAUSAL)
def test_a_causal_lora_switches_the_form(form: str, nano: Path, folders: dict[str, Path]) -> None:
    """As the same LoRA on weights that have the form; the model that it came to stays what it was."""
    full, causal = load_model(nano), load_model(folders[form])
    tensors = lora_file("transformer.{}.lora_{}.weight")
    switched = add_lora(full, build(tensors, Recipe(attention_form=form)), 1.0)[0]
    assert facts_of(switched).recipe.causal_form == form
    before = run(full)
    close(run(switched), run(add_lora(causal, build(tensors), 1.0)[0]))
    close(run(full), before)


def test_a_causal_lora_is_refused_by_another_network() -> None:
    model = toy.model()
    with pytest.raises(LoRAError, match="which ComfyUI's own Qwen-Image network does not have; load the model with"):
        switch_form(model, "test.safetensors", "prefix_causal")


@pytest.fixture
def opened(models: dict[str, Any]) -> Iterator[Any]:
    model = models["prefix_causal"]
    network = model.model.diffusion_model
    network.conditions.open(model)
    yield model
    network.conditions.close()


def test_hooks_on_weights_and_the_switch_keep_nothing(opened: Any, prefills: list[str]) -> None:
    x, text, references = random_inputs()
    for _ in range(2):
        velocity(opened, x, 0.5, text, references)
    assert len(prefills) == 2
    assert kept(opened) == {REFERENCES: 1, TEXT: 1}
    velocity(opened, x, 0.5, text, references, transformer_options={CACHE: "off"})
    opened.model.diffusion_model.conditions.open(SimpleNamespace(hook_patches={"some": {}}))
    velocity(opened, x, 0.5, text, references)
    assert len(prefills) == 6
    assert kept(opened) == {REFERENCES: 0, TEXT: 0}


def test_what_is_kept_is_bounded_and_counted(opened: Any) -> None:
    x, text, references = random_inputs()
    velocity(opened, x, 0.5, text, references)
    stored = opened.model.diffusion_model.conditions.kept
    size = sum(t.nbytes for cache in stored.values() for value in cache.values() for pair in value for t in pair)
    config = opened.model.diffusion_model.config
    assert size == condition_bytes(9 + 15 + 12, config.num_layers, config.width, 4)
    shapes = opened.model.extra_conds_shapes(cross_attn=text, reference_latents=references)
    assert shapes[KEPT] == [1, 9 + 15 + 12]
    with_it = opened.model.memory_required([2, 16, 1, 8, 8], {k: [v] for k, v in shapes.items()})
    without = opened.model.memory_required([2, 16, 1, 8, 8], {"ref_latents": [shapes["ref_latents"]]})
    assert with_it - without == pytest.approx(size)
    for i in range(6):
        velocity(opened, x, 0.5, text + i, references)
    assert kept(opened) == {REFERENCES: 1, TEXT: 4}


def test_a_full_model_counts_nothing_until_a_causal_lora_comes(nano: Path) -> None:
    model = load_model(nano)
    _, text, references = random_inputs()
    assert KEPT not in model.model.extra_conds_shapes(cross_attn=text, reference_latents=references)
    recipe = Recipe(attention_form="reference_causal")
    add_lora(model, build(lora_file("transformer.{}.lora_{}.weight"), recipe), 1.0)
    assert model.model.extra_conds_shapes(cross_attn=text, reference_latents=references)[KEPT] == [1, 27]


@pytest.mark.parametrize("form", CAUSAL)
def test_hooks_see_the_targets_segment(form: str, models: dict[str, Any]) -> None:
    x, text, references = random_inputs()
    words = 9 if form == "reference_causal" else 0
    seen = []

    def same(args: dict, extra: dict) -> dict:
        seen.append((args["img"].shape[1], None if args["txt"] is None else args["txt"].shape[1], args["pe"].shape[2]))
        return extra["original_block"](args)

    watched = models[form].clone()
    watched.set_model_patch_replace(same, "dit", "double_block", 2)
    plain = velocity(models[form], x, 0.5, text, references)
    torch.testing.assert_close(velocity(watched, x, 0.5, text, references), plain, rtol=0, atol=1e-5)
    assert seen == [(16, words or None, words + 16)]


def test_form_of_the_options_goes_before_the_networks(models: dict[str, Any], nano_model: Any) -> None:
    x, text, references = random_inputs()
    for form in CAUSAL:
        got = velocity(nano_model, x, 0.5, text, references, transformer_options={FORM: form})
        torch.testing.assert_close(got, velocity(models[form], x, 0.5, text, references), rtol=0, atol=1e-5)


def test_approximate_uses_references_again_while_t_moves_little(nano_model: Any, prefills: list[str]) -> None:
    """The first call is exact; near it references are not computed; far from it they are; cond and uncond apart."""
    x, text, references = random_inputs()
    model = conditions.with_cache(nano_model, conditions.APPROXIMATE)
    network = model.model.diffusion_model
    network.conditions.open(model)
    sizes: list[int] = []
    hook = network.img_in.register_forward_hook(lambda _, args, __: sizes.append(args[0].shape[1]))
    try:
        near = 0.9 - 0.9 * REUSE_WITHIN
        calls = [(0.9, text), (0.9, text.flip(-1)), (near, text), (near, text.flip(-1)), (0.4, text), (0.3, text)]
        got = [velocity(model, x, t, words, references) for t, words in calls]
    finally:
        hook.remove()
        network.conditions.close()
    everything = 16 + 15 + 12
    assert sizes == [everything, everything, 16, 16, everything, 16]
    for (t, words), v, size in zip(calls, got, sizes, strict=True):
        exact = velocity(nano_model, x, t, words, references)
        if size == everything:
            torch.testing.assert_close(v, exact, rtol=0, atol=1e-5)
        else:
            assert 1e-4 < float((v - exact).norm() / exact.norm()) < 0.3


def test_approximate_is_exact_for_a_causal_form_and_over_when_the_run_is(models: dict[str, Any], nano: Path) -> None:
    model = models["reference_causal"]
    close(run(model, "approximate"), run(model))
    full = load_model(nano)
    assert float((run(full, "approximate", steps=6) - run(full, steps=6)).abs().max()) > 1e-3
    assert len(full.model.diffusion_model.conditions.reused) == 0


def test_approximate_is_refused_by_another_network_and_its_memory_counted(nano: Path) -> None:
    with pytest.raises(UniPicError, match="approximate needs a model from LoadUniPic"):
        conditions.with_cache(toy.model(), conditions.APPROXIMATE)
    model = load_model(nano)
    conditions.with_cache(model, conditions.APPROXIMATE)
    _, text, references = random_inputs()
    assert model.model.extra_conds_shapes(cross_attn=text, reference_latents=references)[KEPT] == [1, 27]


def test_ksampler_of_comfyui_keeps_too(models: dict[str, Any], prefills: list[str]) -> None:
    x, text, references = random_inputs()
    positive = conditioning(text, references)
    comfy.sample.sample(
        models["prefix_causal"],
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
