"""ComfyUI's TrainLoraNode on our MODEL with the conditioning of Multi-Image Compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode
from torch import Tensor
from unipic_pack.nodes.host.model.kv_cache import OFF, with_kv_cache

torch.set_num_threads(1)


def train(model: Any, references: list[Tensor], **more: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of three steps."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(1, 5, 128, generator=generator)
    latents = {"samples": torch.randn(1, 16, 1, 8, 8, generator=generator)}
    settings = {
        "batch_size": 1,
        "steps": 3,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "rank": 2,
        "seed": 5,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
        **more,
    }
    positive = [[words, {"reference_latents": references}]]
    torch.manual_seed(0)  # it draws the LoRA's start and the times without a seed
    lists = {name: [value] for name, value in settings.items()}
    with torch.inference_mode():  # as the executor runs nodes
        made = TrainLoraNode.execute(model=[model], latents=[latents], positive=[positive], **lists)
    return made.args[0], made.args[1]["loss"]


def references() -> list[Tensor]:
    """As nodes make them, under inference mode."""
    with torch.inference_mode():
        return [torch.randn(1, 16, 1, 8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"bypass_mode": True}])
def test_it_trains_with_references(nano_model: Any, more: dict[str, Any]) -> None:
    weights, losses = train(nano_model, references(), **more)
    assert len(losses) == 3
    assert all(torch.isfinite(torch.tensor(losses)))
    moved = [name for name, value in weights.items() if "lora_up" in name and bool(value.abs().sum() > 0)]
    assert any("add_k_proj" in name for name in moved)
    assert any("to_q" in name for name in moved)
    _, others = train(nano_model, [2 * z for z in references()], **more)
    assert others[0] != losses[0]  # the references are seen


@pytest.mark.parametrize("form", ["reference_causal", "prefix_causal"])
def test_nothing_is_kept_from_step_to_step_while_weights_change(causal_models: Any, form: str) -> None:
    model = causal_models[form]
    _, losses = train(model, references())
    _, uncached = train(with_kv_cache(model, OFF), references())
    assert losses == pytest.approx(uncached, rel=1e-5)
