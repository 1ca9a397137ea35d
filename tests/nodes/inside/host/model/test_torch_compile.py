"""ComfyUI's own node for torch.compile on our MODEL, as it is and with the causal LoRA: the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from unipic_pack.nodes.compose import IMAGES, MultiImageCompose
from unipic_pack.nodes.host.model_paths import DEFAULT_MODEL
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.load import LoadUniPic
from unipic_pack.nodes.lora import add_lora, read_lora
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.nodes.sample_images import FOLDER
from unipic_pack.unipic_core.conditioning.images import load_image

torch.set_num_threads(1)


def compiled(model: Any) -> Any:
    """As TorchCompileModel does it, with a backend that needs no compiler."""
    clone = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


@pytest.fixture(scope="module")
def loaded() -> Any:
    return LoadUniPic.execute(DEFAULT_MODEL, "auto", "auto", "as stored").result


@pytest.fixture(scope="module")
def distilled(loaded: Any, causal_lora: Path) -> Any:
    """The same network with a LoRA of a causal form."""
    return add_lora(loaded[0], read_lora(causal_lora), 1.0)[0]


@pytest.mark.parametrize("causal_first", [False, True])
def test_the_picture_is_the_same(loaded: Any, distilled: Any, causal_first: bool) -> None:
    """For both models in turns, though what was compiled for one is there when the other comes; and for another number
    of references, and after the cached keys of a first step."""
    torch._dynamo.reset()
    model, clip, vae = loaded
    for names in (["panda"], ["panda", "beach"]):
        pictures = {IMAGES[i]: to_image(load_image(FOLDER / f"{name}.png")) for i, name in enumerate(names)}
        positive, negative, latent, _ = MultiImageCompose.execute(clip, vae, "the panda", images=pictures).result
        run = (positive, negative, latent, 3, 2, 1.0, "euler", 1.0)
        for one in (distilled, model) if causal_first else (model, distilled):
            expected, got = (FewStepSampler.execute(m, *run).result[0]["samples"] for m in (one, compiled(one)))
            assert torch.isfinite(expected).all()
            assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("cache", ["off", "approximate"])
def test_another_cache_is_noticed(loaded: Any, cache: str) -> None:
    torch._dynamo.reset()
    model, clip, vae = loaded
    pictures = {IMAGES[0]: to_image(load_image(FOLDER / "panda.png"))}
    positive, negative, latent, _ = MultiImageCompose.execute(clip, vae, "the panda", images=pictures).result
    run, compiled_model = (positive, negative, latent, 3, 6, 1.0, "euler", 1.0), compiled(model)
    FewStepSampler.execute(compiled_model, *run)
    expected, got = (FewStepSampler.execute(m, *run, cache).result[0]["samples"] for m in (model, compiled_model))
    assert torch.allclose(got, expected, atol=1e-4)
