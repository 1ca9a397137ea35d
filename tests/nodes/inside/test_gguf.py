"""A MODEL as a GGUF loader makes it works with every node of the pack that takes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from causal_tools import conditioning
from model_tools import random_inputs, relative, velocity
from quantised_files import SIZES, is_matrix, plain, stock_loader
from torch import Tensor
from unipic_pack.nodes.lora import DistillLoRA
from unipic_pack.nodes.sample import FewStepSampler, UniPicSigmas
from unipic_pack.unipic_core.errors import LoRAError
from unipic_pack.unipic_core.weights.lora import save_lora
from unipic_pack.unipic_core.weights.recipe import RELEASED_FEW_STEP, Recipe

pytestmark = pytest.mark.usefixtures("inference")
LAYER = "transformer_blocks.0.attn.to_q"


class Packed(torch.Tensor):
    """Bytes of a matrix in eight bits, with a scale behind each row. Its shape is that of the matrix, as GGUF loaders'
    tensors have it."""

    tensor_shape: torch.Size
    patches: list[Any]

    @staticmethod
    def of(matrix: Tensor) -> Packed:
        scale = (matrix.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
        values = (matrix.float() / scale).round().to(torch.int8)
        packed = torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=1).as_subclass(Packed)
        packed.tensor_shape, packed.patches = matrix.shape, []
        return packed

    def unpacked(self) -> Tensor:
        raw = self.as_subclass(torch.Tensor)
        return raw[:, :-4].contiguous().view(torch.int8).float() * raw[:, -4:].contiguous().view(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        moved = super().to(*args, **kwargs)
        moved.tensor_shape, moved.patches = self.tensor_shape, list(getattr(self, "patches", []))
        return moved

    def clone(self, *args: Any, **kwargs: Any) -> Packed:
        return self

    def detach(self, *args: Any, **kwargs: Any) -> Packed:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


class Operations(comfy.ops.manual_cast):
    """Layers that unpack their weight at each use, with the LoRAs on it, as GGUF loaders' do."""

    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, inputs: int, outputs: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = inputs, outputs, None, None

        def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name], requires_grad=False))

        def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
            weight = self.weight.unpacked() if isinstance(self.weight, Packed) else self.weight
            for patches, key in getattr(self.weight, "patches", []):
                weight = comfy.lora.calculate_weight(patches, weight, key)
            return torch.nn.functional.linear(
                x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
            )


class Patcher(comfy.model_patcher.ModelPatcher):
    """LoRAs go onto packed weights as a list that the layers apply."""

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False, **_: Any) -> Any:
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, Packed):
            return super().patch_weight_to_device(key, device_to, inplace_update)
        if key in self.patches:
            patched = weight.to(device_to)
            patched.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, patched)
        return None

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        for parameter in self.model.parameters() if unpatch_weights else ():
            if isinstance(parameter, Packed):
                parameter.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        return super().load(*args, **{**kwargs, "force_patch_weights": True})

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        own, self.__class__ = self.__class__, Patcher
        made = super().clone(*args, **kwargs)
        made.__class__, self.__class__ = Patcher, own
        return made


def loaded(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], **options: Any) -> Any:
    stock_loader(monkeypatch)
    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(the MODEL of a GGUF loader, the same weights unpacked in ComfyUI's own layers)."""
    packed = {n: Packed.of(t) if is_matrix(n, t) else t for n, t in plain().items()}
    unpacked = {n: t.unpacked() if isinstance(t, Packed) else t for n, t in packed.items()}
    gguf = Patcher.clone(loaded(monkeypatch, packed, custom_operations=Operations))
    assert isinstance(gguf.model.diffusion_model.get_submodule(LAYER).weight, Packed)
    return gguf, loaded(monkeypatch, unpacked)


def inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    x, text, references = random_inputs(width=SIZES.joint_attention_dim)
    return x, text, [z[..., :4, :4] for z in references]


def sampled(model: Any, sampler: str = "auto") -> Tensor:
    x, text, references = inputs()
    positive = conditioning(text, references)
    empty = {"samples": torch.zeros_like(x)}
    return FewStepSampler.execute(model, positive, positive, empty, 3, 2, 1.5, sampler, 1.0)[0]["samples"]


@pytest.fixture
def lora() -> str:
    """The name of a few-step LoRA on packed and plain weights."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    generator, width = torch.Generator().manual_seed(1), SIZES.width
    layers = {
        LAYER: (torch.randn(4, width, generator=generator) * 0.2, torch.randn(width, 4, generator=generator) * 0.2),
        "proj_out": (torch.randn(4, width, generator=generator) * 0.2, torch.randn(64, 4, generator=generator) * 0.2),
    }
    save_lora(folder / "gguf.safetensors", layers, recipe=RELEASED_FEW_STEP)
    return "gguf.safetensors"


@pytest.mark.parametrize("sampler", ["consistency", "euler"])
def test_few_step_sampler(sampler: str, pair: tuple[Any, Any]) -> None:
    gguf, own = pair
    assert relative(sampled(gguf, sampler), sampled(own, sampler)) < 1e-3


def test_times_for_custom_sampling(pair: tuple[Any, Any]) -> None:
    x, *_ = inputs()
    latent = {"samples": torch.zeros_like(x)}
    ours, theirs = (UniPicSigmas.execute(model, latent, 0, 1.0)[0] for model in pair)
    assert torch.equal(ours, theirs)


def test_distill_lora(pair: tuple[Any, Any], lora: str) -> None:
    gguf, _ = pair
    x, text, references = inputs()
    before = velocity(gguf, x, 0.5, text, references)
    with_lora, own_with_lora = (DistillLoRA.execute(model, lora, 1.0)[0] for model in pair)
    got = velocity(with_lora, x, 0.5, text, references)
    want = velocity(own_with_lora, x, 0.5, text, references)
    # ComfyUI's own layers round the sum to bfloat16, packed ones add it at each use
    assert relative(got, want) < 0.005 < relative(got, before) / 4
    assert relative(sampled(with_lora), sampled(own_with_lora)) < 0.005  # with the LoRA's recipe
    assert relative(velocity(gguf, x, 0.5, text, references), before) < 1e-6  # and it is out of the first again


def test_a_causal_lora_is_refused(pair: tuple[Any, Any]) -> None:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    down, up = torch.zeros(2, SIZES.width), torch.zeros(SIZES.width, 2)
    save_lora(folder / "causal.safetensors", {LAYER: (down, up)}, recipe=Recipe(attention_form="prefix_causal"))
    with pytest.raises(LoRAError, match="load the model with Load UniPic"):
        DistillLoRA.execute(pair[0], "causal.safetensors", 1.0)
