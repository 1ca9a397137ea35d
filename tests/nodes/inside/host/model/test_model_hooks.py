"""ComfyUI's hooks on its own Qwen-Image network, on ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_freelunch, nodes_hypertile, nodes_tomesd
from model_tools import random_inputs, relative, velocity
from torch import Tensor
from unipic_pack.unipic_core.conditioning.sequence import (
    LatentShape,
    TextCond,
    pack_latents,
    pack_with_references,
    unpack_latents,
)
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.transformer import load_transformer

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")


def test_block_replacement(nano_model: Any) -> None:
    x, text, references = random_inputs()
    seen = []

    def same(args: dict, extra: dict) -> dict:
        seen.append((args["transformer_options"]["block_index"], args["img"].shape[1], args["pe"].shape[2]))
        return extra["original_block"](args)

    def skip(args: dict, extra: dict) -> dict:
        return {"img": args["img"], "txt": args["txt"]}

    plain = velocity(nano_model, x, 0.5, text, references)
    watched, skipped = nano_model.clone(), nano_model.clone()
    for i in (2, 5):
        watched.set_model_patch_replace(same, "dit", "double_block", i)
    skipped.set_model_patch_replace(skip, "dit", "double_block", 2)
    torch.testing.assert_close(velocity(watched, x, 0.5, text, references), plain, rtol=0, atol=1e-5)
    tokens = 16 + 15 + 12
    assert seen == [(2, tokens, 9 + tokens), (5, tokens, 9 + tokens)]
    assert relative(velocity(skipped, x, 0.5, text, references), plain) > 0.01


def test_attention_override(nano_model: Any) -> None:
    x, text, references = random_inputs()
    calls = []

    def override(attention: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs["transformer_options"]["block_index"], tuple(q.shape), k.shape[2], heads))
        return attention(q, k, v * 0, heads, *args, **kwargs)

    plain = velocity(nano_model, x, 0.5, text, references)
    got = velocity(nano_model, x, 0.5, text, references, transformer_options={"optimized_attention_override": override})
    tokens = 9 + 16 + 15 + 12
    assert calls == [(i, (1, 5, tokens, 32), tokens, 5) for i in range(6)]
    assert relative(got, plain) > 0.1


def test_control_residuals(nano_model: Any) -> None:
    """Block i's residual is added to the first tokens; here it undoes what a patch adds."""
    x, text, references = random_inputs()
    residual = torch.randn(1, 16, 160, generator=torch.Generator().manual_seed(1))
    plain = velocity(nano_model, x, 0.5, text, references)

    def remove(args: dict) -> dict:
        if args["block_index"] in (2, 5):
            args["img"] = torch.cat([args["img"][:, :16] - residual, args["img"][:, 16:]], dim=1)
        return args

    control = {"input": [None, None, residual, None, None, residual]}
    alone = velocity(nano_model, x, 0.5, text, references, control=control)
    both = velocity(
        nano_model,
        x,
        0.5,
        text,
        references,
        control=control,
        transformer_options={"patches": {"double_block": [remove]}},
    )
    assert relative(alone, plain) > 0.1
    torch.testing.assert_close(both, plain, rtol=0, atol=2e-5)


def test_fun_controlnet_shares_layers_with_the_network(nano_model: Any) -> None:
    """ComfyUI's ControlNet that takes its first layers and its positions from the network that it controls."""
    from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel

    x, text, references = random_inputs()
    network = nano_model.model.diffusion_model
    control = QwenImageFunControlNetModel(
        inner_dim=160,
        num_attention_heads=5,
        attention_head_dim=32,
        num_control_blocks=2,
        main_model_double=6,
        injection_layers=(0, 3),
        operations=comfy.ops.manual_cast,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(2)
    for p in control.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    odd = x[..., :7]
    residuals = control(odd, torch.tensor([0.5]), text, hint=odd, base_model=network)
    assert [r is None for r in residuals["input"]] == [False, True, True, False, True, True]
    plain = velocity(nano_model, odd, 0.5, text, references)
    assert relative(velocity(nano_model, odd, 0.5, text, references, control=residuals), plain) > 0.01


def test_input_and_attention_patches(nano_model: Any) -> None:
    x, text, references = random_inputs()
    seen: dict[str, Any] = {}

    def post_input(args: dict) -> dict:
        seen["ids"] = (args["img_ids"].clone(), args["txt_ids"].clone())
        args["img_ids"] = args["img_ids"] + torch.tensor([0, 1.0, 0])  # the same shift everywhere changes nothing
        args["txt_ids"] = args["txt_ids"] + torch.tensor([0, 1.0, 0])
        return args

    def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Any, extra_options: dict) -> dict:
        seen.setdefault("slices", []).append((extra_options["block_index"], extra_options["img_slice"]))
        seen["references"] = extra_options["reference_image_num_tokens"]
        return {"q": q * 1.5, "k": k / 1.5}

    plain = velocity(nano_model, x, 0.5, text, references)
    patches = {"patches": {"post_input": [post_input], "attn1_patch": [attention]}}
    got = velocity(nano_model, x, 0.5, text, references, transformer_options=patches)
    torch.testing.assert_close(got, plain, rtol=0, atol=5e-5)
    pictures, words = seen["ids"]
    assert pictures.shape == (1, 43, 3)
    assert words[0, :, 0].tolist() == list(range(3, 12))  # after half of the largest side, 6 of a reference
    assert sorted(set(pictures[0, :, 0].tolist())) == [0, 1, 2]
    assert seen["slices"] == [(i, [9, 52]) for i in range(6)]
    assert seen["references"] == [15, 12]


def test_wrapper_sees_every_call(nano_model: Any) -> None:
    x, text, references = random_inputs()
    seen = []

    def wrapper(
        executor: Any, x: Tensor, t: Tensor, context: Tensor, mask: Any, refs: Any, *args: Any, **kw: Any
    ) -> Any:
        seen.append((type(executor.class_obj).__name__, tuple(x.shape), len(refs)))
        return executor(x, t, context, mask, refs, *args, **kw) * 2

    wrapped = nano_model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    options = {"wrappers": wrapped.wrappers}
    got = velocity(wrapped, x, 0.5, text, references, transformer_options=options)
    assert seen == [("ComfyMMDiT", (1, 16, 1, 8, 8), 2)]
    torch.testing.assert_close(got, 2 * velocity(nano_model, x, 0.5, text, references))


def test_a_wrapper_may_write_into_the_latent(nano_model: Any) -> None:
    x, text, references = random_inputs()

    def wrapper(executor: Any, x: Tensor, *args: Any, **kw: Any) -> Any:
        return executor(x.zero_(), *args, **kw)

    wrapped = nano_model.clone()
    wrapped.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    before = x.clone()
    velocity(wrapped, x, 0.5, text, references, transformer_options={"wrappers": wrapped.wrappers})
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_easycache_skips_steps_and_makes_nearly_the_same_latents(nano_model: Any) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    x, text, references = random_inputs()
    cond = [[text, {"reference_latents": references}]]
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.linspace(1, 0, 13)

    def latents(model: Any) -> Tensor:
        return comfy.sample.sample_custom(
            model, x, 1.0, sampler, sigmas, cond, cond, torch.zeros_like(x), seed=0, disable_pbar=True
        )

    calls = []
    counted = nano_model.clone()
    counted.set_model_patch_replace(
        lambda args, extra: calls.append(1) or extra["original_block"](args), "dit", "double_block", 0
    )
    cached = EasyCacheNode.execute(counted, reuse_threshold=0.3, start_percent=0.15, end_percent=0.95, verbose=False)[0]
    got = latents(cached)
    assert 4 < len(calls) < 12
    assert relative(got, latents(nano_model)) < 0.1  # 1.01 where its sums end in the sampler's latent


def test_reference_methods(nano_model: Any) -> None:
    x, text, references = random_inputs()
    results = {
        method: velocity(nano_model, x, 0.5, text, references, ref_latents_method=method)
        for method in ("index", "index_timestep_zero", "negative_index")
    }
    plain = velocity(nano_model, x, 0.5, text, references)
    torch.testing.assert_close(results["index"], plain)
    assert relative(results["index_timestep_zero"], plain) > 1e-3
    assert relative(results["negative_index"], plain) > 1e-3
    with pytest.raises(UniPicError, match="got 'offset'; choose index in the node that sets it"):
        velocity(nano_model, x, 0.5, text, references, ref_latents_method="offset")


def test_references_at_time_zero_are_the_cores_zero_cond_t(nano: Path, nano_model: Any) -> None:
    x, text, references = random_inputs()
    network = load_transformer(nano, dtype=torch.float32)
    network.config = replace(network.config, zero_cond_t=True)
    packed = pack_with_references(pack_latents(x), LatentShape(1, 4, 4), [references])
    want = unpack_latents(network(packed, 0.5, TextCond(text)), LatentShape(1, 4, 4))
    got = velocity(nano_model, x, 0.5, text, references, ref_latents_method="index_timestep_zero")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_flux_kv_cache_node(nano_model: Any) -> None:
    """ComfyUI's own cache of references: the first call fills it, the second leaves the references out."""
    from comfy_extras.nodes_flux import FluxKVCache

    x, text, references = random_inputs()
    cached = FluxKVCache.execute(nano_model).result[0]
    management.load_models_gpu([cached])
    cached.patch_model()
    first, second = (velocity(cached, x, 0.5, text, references) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=2e-5)
    cached.unpatch_model()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_patches_get_what_comfyuis_network_gives(nano_model: Any, masked: bool) -> None:
    """Kinds, shapes and options of every argument, and the text's mask itself."""

    def described(*args: Tensor, **more: Any) -> dict[str, Any]:
        options = more.pop("extra_options")
        known = {
            name: options[name] for name in ("img_slice", "block_index", "block_type", "reference_image_num_tokens")
        }
        tensors = [(t.shape, t.dtype) for t in args]
        shapes = {name: None if t is None else (t.shape, t.dtype) for name, t in more.items()}
        return {"tensors": tensors, "named": shapes, "options": known, "mask": more["attn_mask"]}

    def recorded(into: list[Any]) -> Any:
        def patch(*args: Tensor, **more: Any) -> dict[str, Any]:
            into.append(described(*args, **more))
            return {"attn_mask": None}

        return {"patches": {"attn1_patch": [patch]}}

    x, text, references = random_inputs()
    mask = torch.tensor([[1] * 6 + [0] * 3]) if masked else None
    ours: list[Any] = []
    made = velocity(nano_model, x, 0.5, text, references, attention_mask=mask, transformer_options=recorded(ours))
    plain = velocity(nano_model, x, 0.5, text, references, attention_mask=mask)
    torch.testing.assert_close(made, plain, rtol=0, atol=1e-5)
    config = nano_model.model.diffusion_model.config
    sizes = {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 5, "joint_attention_dim": 128}
    network = QwenImageTransformer2DModel(
        **sizes, axes_dims_rope=config.axes_dims_rope, operations=comfy.ops.manual_cast
    )
    theirs: list[Any] = []
    network(x, torch.tensor([0.5]), text, mask, references, transformer_options=recorded(theirs))
    assert len(ours) == len(theirs) == 6
    for mine, stock in zip(ours[:1], theirs[:1], strict=True):  # the stock one hands the patch's mask to later patches
        assert {**mine, "mask": None} == {**stock, "mask": None}
        assert (mine["mask"] is None) == (stock["mask"] is None) == (not masked)
        assert not masked or torch.equal(mine["mask"], stock["mask"])


def patched_for_unets(node: str, model: Any) -> Any:
    made = {
        "TomePatchModel": lambda: nodes_tomesd.TomePatchModel.execute(model, 0.3).args[0],
        "HyperTile": lambda: nodes_hypertile.HyperTile.execute(model, 256, 2, 0, False)[0],
    }
    return made[node]()


@pytest.mark.parametrize("node", ["TomePatchModel", "HyperTile"])
def test_attention_patches_of_unets_are_refused_in_a_sentence(nano_model: Any, node: str) -> None:
    """On ComfyUI's own network the same call ends in Python's TypeError: neither knows `pe`."""
    model, (x, text, references) = patched_for_unets(node, nano_model), random_inputs()
    with pytest.raises(UniPicError, match=f"{node} changes the attention of U-Nets such as SDXL and does not know"):
        velocity(model, x, 0.5, text, references)
    sizes = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 5, "joint_attention_dim": 128}
    ours = nano_model.model.diffusion_model.config.axes_dims_rope
    network = QwenImageTransformer2DModel(**sizes, axes_dims_rope=ours, operations=comfy.ops.manual_cast)
    options = model.model_options["transformer_options"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'pe'"), torch.inference_mode():
        network(x, torch.tensor([0.5]), text, transformer_options=options)


def test_freeu_is_refused_by_its_own_node(nano_model: Any) -> None:
    """As on ComfyUI's own Qwen-Image: there is no U-Net's number of channels."""
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image"})
    assert "model_channels" not in config.unet_config
    with pytest.raises(KeyError, match="model_channels"):
        nodes_freelunch.FreeU.execute(nano_model, 1.1, 1.2, 0.9, 0.2)
