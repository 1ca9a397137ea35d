"""The pipeline beyond parity: caches, seeds, guidance, recipes, LoRAs, memory, wrong use, wrong folders."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unipic_core.caching import LRU
from unipic_core.errors import CheckpointError, LoRAError, UniPicError
from unipic_core.pipeline import UniPicPipeline
from unipic_core.pipeline.loading import check_fit, load_parts
from unipic_core.pipeline.offload import Placement, checked_device, needs_offload, readable_out_of_memory
from unipic_core.recipe import Recipe
from unipic_core.settings import resolve

SMALL: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "num_inference_steps": 2,
    "true_cfg_scale": 1.0,
    "sampler": "consistency",
    "reference_budget": 64,
    "output_type": "latent",
}


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    data = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(data.numpy())


@pytest.fixture
def calls(tiny: UniPicPipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of the networks; "pictures" counts what goes through the VAE's encoder."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, method: str, name: str, pictures: str | None = None) -> None:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            if pictures:
                counts[pictures] += len(args[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    counted(tiny.text_encoder, "encode", "text")
    counted(tiny.text_encoder.network.visual, "forward", "vision")
    counted(tiny.vae, "encode", "vae", "pictures")
    counted(tiny.transformer, "forward", "network")
    return counts


def test_a_second_seed_encodes_nothing_again(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    images = [picture(0), picture(1)]
    first = tiny(images, "a", **SMALL, seed=1).images
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 2, "network": 2}
    second = tiny([i.copy() for i in images], "a", **SMALL, seed=2).images
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 2, "network": 4}
    assert not torch.equal(first, second)
    assert torch.equal(tiny(images, "a", **SMALL, seed=1).images, first)


def test_caches_notice_what_changes(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture(0), picture(1)], "a", **SMALL)
    tiny([picture(0), picture(1)], "b", **SMALL)
    assert (calls["text"], calls["pictures"]) == (2, 2)
    tiny([picture(1), picture(0)], "b", **SMALL)  # the order counts for the text, not for the latents
    assert (calls["text"], calls["pictures"]) == (3, 2)
    tiny([picture(1), picture(0)], "b", **{**SMALL, "reference_budget": 96})
    assert (calls["text"], calls["pictures"]) == (4, 4)
    changed = picture(1)
    changed.putpixel((0, 0), (1, 2, 3))
    tiny([changed, picture(0)], "b", **SMALL)
    assert (calls["text"], calls["pictures"]) == (5, 5)
    assert calls["vision"] == 4  # every change but that of the prompt
    for module, part in ((tiny.text_encoder.network, "text"), (tiny.vae.model, "pictures")):
        before, weight = calls[part], next(module.parameters())
        weight.mul_(1.0)  # an optimizer step in place
        tiny([changed, picture(0)], "b", **SMALL)
        assert calls[part] > before


def test_guidance_one_runs_and_encodes_no_unconditional(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture()], "a", negative_prompt="<|im_end|> would be refused if it were read", **SMALL)
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 1, "network": 2}
    tiny([picture()], "a", **{**SMALL, "true_cfg_scale": 2.0})
    assert calls == {"text": 2, "vision": 1, "vae": 1, "pictures": 1, "network": 6}


def test_prompt_and_negative_prompt_share_the_vision_tower(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    tiny([picture(0), picture(1)], "a", **{**SMALL, "true_cfg_scale": 2.0})
    assert (calls["text"], calls["vision"]) == (2, 1)
    tiny([picture(0), picture(1)], "another", **{**SMALL, "true_cfg_scale": 2.0})
    assert (calls["text"], calls["vision"]) == (3, 1)
    with pytest.warns(UserWarning, match="no pictures given"):
        tiny([], "a", **SMALL)
    assert (calls["text"], calls["vision"]) == (4, 1)


def test_references_of_one_size_go_through_the_vae_together(tiny: UniPicPipeline, calls: Counter[str]) -> None:
    pictures = [picture(0, 64, 32), picture(1, 32, 32), picture(2, 64, 32), picture(0, 64, 32)]
    known = tiny._encode_references([picture(1, 32, 32)])[0]
    together = tiny._encode_references(pictures)
    assert (calls["vae"], calls["pictures"]) == (2, 3)  # the second is known and the fourth is the first
    assert together[1] is known
    tiny.clear_cache()
    for latent, reference in zip(together, pictures, strict=True):
        torch.testing.assert_close(latent, tiny._encode_references([reference])[0], rtol=0, atol=1e-5)
    assert tiny._encode_references([]) == []


def test_a_full_cache_keeps_what_is_asked_for(tiny: UniPicPipeline, calls: Counter[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny, "_reference_cache", LRU(2))
    old, *new = (picture(i, 32, 32) for i in range(3))
    first = tiny._encode_references([old])[0]
    assert tiny._encode_references([*new, old])[-1] is first
    assert calls["pictures"] == 3


def test_image_i_of_many_is_what_its_seed_gives_alone(tiny: UniPicPipeline) -> None:
    out = tiny([picture()], "a", **SMALL, seed=5, num_images=3)
    assert out.images.shape == (3, 12, 16)
    assert out.seeds == [5, 6, 7]
    for image, seed in zip(out.images, out.seeds, strict=True):
        alone = tiny([picture()], "a", **SMALL, seed=seed).images[0]
        torch.testing.assert_close(image, alone, rtol=1e-4, atol=1e-4)


def test_outputs(tiny: UniPicPipeline) -> None:
    small = {**SMALL, "width": 32, "height": 16}
    as_images = tiny([picture()], "a", **{**small, "output_type": "pil"}, num_images=2).images
    assert [i.size for i in as_images] == [(32, 16)] * 2
    assert tiny([picture()], "a", **{**small, "output_type": "pt"}).images.shape == (1, 3, 16, 32)
    assert tiny(picture(), "a", **small).images.shape == (1, 2, 16)  # one picture needs no list


def test_bfloat16_samples_in_float32(golden: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", device="cpu")
    seen: list[torch.dtype] = []
    out = pipe([picture()], "a", **SMALL, callback=lambda step, t, x_t, x0: seen.extend([x_t.dtype, x0.dtype]))
    assert pipe.transformer.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    assert out.images.dtype == torch.float32
    with pytest.raises(UniPicError, match="float16"):
        UniPicPipeline.from_pretrained(golden / "tiny", device="cpu", torch_dtype=torch.float16)


def test_no_references(tiny: UniPicPipeline) -> None:
    with pytest.warns(UserWarning, match="no pictures given"):
        out = tiny([], "a", **{**SMALL, "width": None, "height": 32})
    assert out.images.shape == (1, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [picture()] * 7}, "at most 6 pictures can be composed, got 7"),
        ({"images": ["a.png"]}, "images must be Pillow pictures, got str"),
        ({"prompt": ["a"]}, "prompt must be a text, got list"),
        ({"width": 50}, "multiples of 16, got 50x48; use 48x48"),
        ({"width": 4096, "height": 4096}, "over this model's 1024x1024 pixels; use 1024x1024"),
        ({"width": -64}, "positive whole pixels, got -64x48"),
        ({"num_inference_steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"true_cfg_scale": float("nan")}, "guidance scale must be a number"),
        ({"sampler": "heun"}, "sampler must be one of consistency, euler, got 'heun'"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"num_images": 0}, "number of images must be from 1"),
        ({"reference_budget": 8}, "reference budget must be from 32"),
        ({"output_type": "np"}, "output_type must be one of pil, pt, latent, got 'np'"),
        ({"latents": torch.zeros(1, 5, 16)}, r"packed start noise \[1, 12, 16\], got \[1, 5, 16\]"),
        ({"step_noise": []}, r"must hold 1 tensors of \[1, 12, 16\], got \[\]"),
    ],
)
def test_wrong_use(tiny: UniPicPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UniPicError, match=message) as caught:
        tiny(**{"images": [picture()], "prompt": "a", **SMALL, **change})
    assert "\n" not in str(caught.value)


def test_empty_and_long_prompts(tiny: UniPicPipeline) -> None:
    assert tiny([picture()], "", **SMALL).images.isfinite().all()
    with pytest.raises(UniPicError, match=r"too long.*of at most 32768; shorten it"):
        tiny([picture()], "word " * 8000, **SMALL)


def test_given_latents_decide_how_many(tiny: UniPicPipeline) -> None:
    noise = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    out = tiny([picture()], "a", **SMALL, latents=noise)
    assert out.images.shape == (2, 12, 16)
    with pytest.raises(UniPicError, match="packed start noise"):
        tiny([picture()], "a", **SMALL, latents=noise, num_images=3)


def test_non_finite_latent_names_the_step(tiny: UniPicPipeline) -> None:
    with pytest.raises(ValueError, match="step 1; use bfloat16 or float32"):
        tiny([picture()], "a", **SMALL, latents=torch.full((1, 12, 16), float("nan")))


# --- recipes ---


def test_defaults_are_those_of_the_release() -> None:
    base = resolve(Recipe())
    assert (base.steps, base.guidance, base.sampler, base.schedule) == (50, 4.0, "euler", "base")
    assert (base.reference_budget, base.output_budget) == (1024, 1024)
    few = resolve(Recipe(sampler="consistency"))
    assert (few.steps, few.guidance, few.schedule) == (8, 1.0, "few_step")


def test_recipe_and_wishes() -> None:
    recipe = Recipe(steps=6, guidance=2.0, sampler="consistency", schedule="few_step", output_budget=128)
    assert resolve(recipe).steps == 6
    assert resolve(recipe).output_budget == 128
    assert resolve(recipe, steps=3, guidance=1.0).guidance == 1.0
    other = resolve(recipe, sampler="euler")  # what the recipe says stays
    assert (other.steps, other.schedule, other.guidance) == (6, "few_step", 2.0)
    open_ = resolve(Recipe(steps=8, sampler="consistency"), sampler="euler")  # the sampler fills what it leaves open
    assert (open_.steps, open_.schedule, open_.guidance) == (8, "base", 4.0)
    with pytest.raises(UniPicError, match="attention of the form 'causal'"):
        resolve(Recipe(attention_form="causal"))


def with_transformer(golden: Path, to: Path, recipe: dict[str, Any]) -> Path:
    shutil.copytree(golden / "tiny" / "transformer", to)
    (to / "recipe.json").write_text(json.dumps({"version": 1, **recipe}))
    return to


def test_recipe_and_network_come_with_the_transformer(golden: Path, tmp_path: Path, tiny: UniPicPipeline) -> None:
    recipe = {"steps": 3, "guidance": 1.0, "sampler": "consistency", "schedule": "few_step", "reference_budget": 64}
    other = with_transformer(golden, tmp_path / "ema_transformer", {**recipe, "output_budget": 64})
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({n: t * 1.1 for n, t in weights.items()}, other / "diffusion_pytorch_model.safetensors")
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", other, torch_dtype=torch.float32, device="cpu")
    out = pipe([picture()], "a", output_type="latent")
    assert (out.settings.steps, out.settings.reference_budget) == (3, 64)
    assert out.images.shape == (1, 4 * 4, 16)  # 40x30 at 64x64 pixels is 74x55, to 32: 64x64
    assert not torch.equal(pipe.transformer.img_in.weight, tiny.transformer.img_in.weight)


def lora_file(path: Path, weight: str, tiny: UniPicPipeline, recipe: Recipe | None = None) -> Path:
    from unipic_core.lora import save_lora

    out, into = tiny.transformer.get_parameter(f"{weight}.weight").shape
    generator = torch.Generator().manual_seed(0)
    layers = {weight: (torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator))}
    save_lora(path, layers, recipe=recipe)
    return path


def test_lora(golden: Path, tmp_path: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", torch_dtype=torch.float32, device="cpu")
    layer = "transformer_blocks.0.attn.to_q"
    before = pipe.transformer.get_parameter(f"{layer}.weight").clone()
    plain = pipe([picture()], "a", **SMALL).images
    path = lora_file(tmp_path / "a.safetensors", layer, pipe, Recipe(steps=4, sampler="consistency"))
    assert pipe.load_lora(path, 0.5).matched == 1
    assert not torch.allclose(pipe([picture()], "a", **SMALL).images, plain)
    assert resolve(pipe.recipe).steps == 4  # the LoRA's over the checkpoint's
    pipe.load_lora(path, -0.5)
    assert pipe.recipe == pipe.base_recipe
    torch.testing.assert_close(pipe.transformer.get_parameter(f"{layer}.weight"), before)
    strange = {
        "transformer.other.lora_A.weight": torch.zeros(2, 4),
        "transformer.other.lora_B.weight": torch.zeros(4, 2),
    }
    save_file(strange, tmp_path / "b.safetensors")
    with pytest.raises(LoRAError):
        pipe.load_lora(tmp_path / "b.safetensors")


def test_recipes_of_loras_come_and_go(golden: Path, tmp_path: Path) -> None:
    pipe = UniPicPipeline.from_pretrained(golden / "tiny", torch_dtype=torch.float32, device="cpu")
    base, layer = pipe.recipe, "transformer_blocks.0.attn.to_q"
    first = lora_file(tmp_path / "a.safetensors", layer, pipe, Recipe(steps=4, sampler="consistency"))
    second = lora_file(tmp_path / "b.safetensors", layer, pipe, Recipe(steps=2))
    before = pipe.transformer.get_parameter(f"{layer}.weight").clone()
    assert pipe.load_lora(first, 0.0).matched == 1
    assert pipe.recipe == base
    assert torch.equal(pipe.transformer.get_parameter(f"{layer}.weight"), before)
    pipe.load_lora(first, 0.3)
    pipe.load_lora(second, 1.0)
    assert (pipe.recipe.steps, pipe.recipe.sampler) == (2, "consistency")
    pipe.load_lora(first, 0.4)
    pipe.load_lora(second, -1.0)
    assert (pipe.recipe.steps, pipe.recipe.sampler) == (4, "consistency")
    pipe.load_lora(first, -0.7)  # 0.3 + 0.4 - 0.7 is not quite 0
    assert pipe.recipe == base
    with pytest.raises(UniPicError, match="strength of a LoRA must be a number, got nan"):
        pipe.load_lora(first, float("nan"))


# --- folders ---


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    return shutil.copytree(golden / "tiny", tmp_path / "model")


def load(folder: Path, **more: Any) -> UniPicPipeline:
    return UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu", **more)


def test_missing_parts_are_named_with_what_to_download(folder: Path, golden: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        load(folder / "absent")
    with pytest.raises(CheckpointError, match="is one file, expected a pipeline folder"):
        load(folder / "model_index.json")
    for part in ("vae", "text_encoder"):
        shutil.rmtree(folder / part)
    with pytest.raises(CheckpointError, match=r"no text_encoder/, vae/; download Qwen/Qwen-Image-Edit.*transformer="):
        load(folder)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(CheckpointError, match="has no text_encoder/, vae/; download Qwen/Qwen-Image-Edit"):
        load(folder)


def test_network_missing(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    with pytest.raises(CheckpointError, match="no transformer in"):
        load(folder)


def test_damaged_vae(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    good = load_file(weights)
    save_file({n: t for n, t in good.items() if "conv_in.weight" not in n}, weights)
    with pytest.raises(CheckpointError, match=r"VAE in .* does not fit its config\.json .*conv_in\.weight"):
        load(folder)
    weights.write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors"):
        load(folder)
    save_file(good, weights)
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="describes a AutoencoderKL, expected an AutoencoderKLQwenImage"):
        load(folder)


def test_parts_of_different_models(folder: Path, golden: Path) -> None:
    config = folder / "vae" / "config.json"
    values = json.loads(config.read_text()) | {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    config.write_text(json.dumps(values))
    from diffusers import AutoencoderKLQwenImage

    AutoencoderKLQwenImage.from_config(values).save_pretrained(folder / "vae")
    with pytest.raises(CheckpointError, match="takes 16 channels a token and gives 16, the VAE has 32"):
        load(folder)


def test_a_network_whose_output_does_not_fit_the_vae(tiny: UniPicPipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny.transformer, "config", replace(tiny.transformer.config, out_channels=16))
    with pytest.raises(CheckpointError, match="takes 16 channels a token and gives 64, the VAE has 16"):
        check_fit(tiny.transformer, tiny.text_encoder, tiny.vae)


def test_float16_is_refused_before_anything_is_loaded(golden: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("unipic_core.pipeline.loading.TextEncoder", None)
    with pytest.raises(CheckpointError, match="float16 overflows"):
        load_parts(golden / "tiny", None, torch.float16, "cpu")


def test_scheduler_config_decides_the_shift(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_shift": 0.25}))
    assert load_parts(folder, None, torch.float32, "cpu").shift.base_mu == 0.25
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config.json cannot be read"):
        load(folder)


# --- memory ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(golden: Path) -> None:
    with pytest.raises(UniPicError, match='pass device="cpu"'):
        UniPicPipeline.from_pretrained(golden / "tiny")
    with pytest.raises(UniPicError, match="no device 'gpu'"):
        checked_device("gpu")


def test_offload_is_decided_by_free_memory() -> None:
    cuda, parts = torch.device("cuda"), [40 * 2**30, 16 * 2**30]
    for free, expected in ((80, False), (62, False), (60, True), (24, True)):
        assert needs_offload(cuda, parts, lambda device, free=free: (free * 2**30, 80 * 2**30)) is expected
    assert not needs_offload(torch.device("cpu"), parts)


def test_only_the_part_in_use_is_on_the_device() -> None:
    class Part:
        place = "cpu"

        def to(self, device: Any) -> None:
            self.place = str(device)

    parts = {"a": Part(), "b": Part()}
    for offload, other in ((True, "cpu"), (False, "meta")):
        placement = Placement(torch.device("meta"), offload)
        for name in ("a", "b"):
            assert placement.place(parts, name).place == "meta"
        assert parts["a"].place == other


def test_offloading_keeps_the_caches(tiny: UniPicPipeline, calls: Counter[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiny.placement, "offload", True)
    moved: list[str] = []

    def moving(name: str, module: torch.nn.Module) -> Any:
        def to(device: Any) -> None:
            moved.append(name)
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()  # as a move to another device gives it another place

        return to

    for name, module in (("transformer", tiny.transformer), ("text_encoder", tiny.text_encoder.network)):
        monkeypatch.setattr(getattr(tiny, name), "to", moving(name, module))
    monkeypatch.setattr(tiny.vae, "to", moving("vae", tiny.vae.model))
    tiny([picture()], "a", **SMALL)
    assert set(moved) == {"transformer", "text_encoder", "vae"}
    tiny([picture()], "a", **SMALL, seed=3)
    assert calls == {"text": 1, "vision": 1, "vae": 1, "pictures": 1, "network": 4}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_out_of_memory_says_what_to_lower(tiny: UniPicPipeline, monkeypatch: Any, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(tiny.transformer, "forward", fail)
    message = r"out of memory; lower the output size \(now 64x48\), or the reference budget \(now 64\)"
    with pytest.raises(UniPicError, match=message):
        tiny([picture()], "a", **SMALL)
    with pytest.raises(UniPicError, match=r"or the number of images \(now 2\)"):
        tiny([picture()], "a", **SMALL, num_images=2)


def test_other_runtime_errors_are_not_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), readable_out_of_memory("x"):
        raise RuntimeError("shapes do not match")
