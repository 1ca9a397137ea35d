"""Adapters beside the plain product: DoRA, OFT, replacements, biases, norms; wrappers and alphas in names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.paths import TINY
from unipic_core.errors import LoRAError
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import merge_lora, read_lora
from unipic_core.weights.transformer import load_transformer

LAYER, RANK = "transformer_blocks.0.attn.to_q", 4
SOURCE = TINY / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model() -> MMDiT:
    return load_transformer(TINY)


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return load_file(SOURCE)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(RANK, 64, generator=generator), 0.1 * torch.randn(64, RANK, generator=generator)


def product(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"{LAYER}.lora_A.weight": pair[0], f"{LAYER}.lora_B.weight": pair[1]}


def merged(folder: Path, tensors: dict[str, Tensor], model: MMDiT, strength: float = 1.0) -> dict[str, Tensor]:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "l.safetensors")
    merge_lora(model, read_lora(folder / "l.safetensors"), strength)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_gives_the_rows_their_magnitudes(
    key: str, strength: float, tmp_path: Path, model: MMDiT, base: dict[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    magnitudes = torch.linspace(0.5, 2.0, 64)
    stored = magnitudes[:, None] if key == "dora_scale" else magnitudes
    alpha = {f"{LAYER}.alpha": torch.tensor(2.0)}
    got = merged(tmp_path, {**product(pair), **alpha, f"{LAYER}.{key}": stored}, model, strength)
    weight = base[f"{LAYER}.weight"]
    whole = weight + 2 / RANK * pair[1] @ pair[0]
    want = torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(magnitudes, whole, strict=True)])
    torch.testing.assert_close(got[f"{LAYER}.weight"], weight + strength * (want - weight), atol=1e-6, rtol=1e-5)
    if strength == 1:
        torch.testing.assert_close(got[f"{LAYER}.weight"].norm(dim=1), magnitudes)


def test_dora_as_peft_merges_it(tmp_path: Path, model: MMDiT, pair: tuple[Tensor, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64))
    weight = model.get_submodule(LAYER).weight.detach().clone()
    layer[0].weight.data.copy_(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(layer, config)
    tuner = theirs.base_model.model[0]
    tuner.lora_A["default"].weight.data.copy_(pair[0])
    tuner.lora_B["default"].weight.data.copy_(pair[1])
    tuner.lora_magnitude_vector["default"].weight.data.mul_(1.3)
    magnitudes = tuner.lora_magnitude_vector["default"].weight.data.clone()
    fused = theirs.merge_and_unload()[0].weight.detach()
    tensors = {**product(pair), f"{LAYER}.lora_magnitude_vector": magnitudes, f"{LAYER}.lora_alpha": torch.tensor(3.0)}
    torch.testing.assert_close(merged(tmp_path, tensors, model)[f"{LAYER}.weight"], fused, atol=1e-6, rtol=1e-5)


def test_dora_along_the_inputs(
    tmp_path: Path, model: MMDiT, base: dict[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    got = merged(tmp_path, {**product(pair), f"{LAYER}.dora_scale": torch.full((1, 64), 1.5)}, model)
    torch.testing.assert_close(got[f"{LAYER}.weight"].norm(dim=0), torch.full((64,), 1.5))


@pytest.mark.parametrize("constraint", [None, 0.05])
def test_oft_turns_blocks_of_outputs(
    constraint: float | None, tmp_path: Path, model: MMDiT, base: dict[str, Tensor]
) -> None:
    blocks = 0.1 * torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(2))
    tensors = {f"{LAYER}.oft_blocks": blocks}
    skew = blocks - blocks.transpose(1, 2)
    if constraint:
        tensors[f"{LAYER}.alpha"] = torch.tensor(constraint)
        skew = skew * constraint / (skew.norm() + 1e-8)
    got = merged(tmp_path, tensors, model)[f"{LAYER}.weight"]
    weight, one = base[f"{LAYER}.weight"], torch.eye(8)
    for i, q in enumerate(skew):
        turn = (one + q) @ torch.linalg.inv(one - q)
        torch.testing.assert_close(got[8 * i : 8 * i + 8], turn.T @ weight[8 * i : 8 * i + 8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.T @ got, weight.T @ weight, atol=1e-4, rtol=1e-4)  # lengths and angles stay
    assert not torch.allclose(got, weight, atol=1e-3)


def test_replacements_norms_and_biases(
    tmp_path: Path, model: MMDiT, base: dict[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    norm, ones = "transformer_blocks.0.attn.norm_q", torch.ones(32)
    tensors = {
        **product(pair),
        f"{LAYER}.lora_alpha": torch.tensor(8.0),
        f"{LAYER}.lora_B.bias": torch.full((64,), 0.25),
        f"{norm}.w_norm": 0.5 * ones,
        "img_in.set_weight": torch.full((64, 16), 0.125),
    }
    got = merged(tmp_path, tensors, model)
    delta = 8 / RANK * pair[1] @ pair[0]
    torch.testing.assert_close(got[f"{LAYER}.weight"], base[f"{LAYER}.weight"] + delta, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[f"{LAYER}.bias"], base[f"{LAYER}.bias"] + 8 / RANK * 0.25)
    torch.testing.assert_close(got[f"{norm}.weight"], base[f"{norm}.weight"] + 0.5)
    assert torch.equal(got["img_in.weight"], torch.full((64, 16), 0.125))


@pytest.mark.parametrize("alpha", ["alpha", "lora_alpha", "network_alpha"])
def test_every_name_of_alpha(
    alpha: str, tmp_path: Path, model: MMDiT, base: dict[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    got = merged(tmp_path, {**product(pair), f"{LAYER}.{alpha}": torch.tensor(1.0)}, model)
    want = base[f"{LAYER}.weight"] + pair[1] @ pair[0] / RANK
    torch.testing.assert_close(got[f"{LAYER}.weight"], want, atol=1e-6, rtol=1e-6)


WRAPPED = (
    "_fsdp_wrapped_module.transformer_blocks.0._fsdp_wrapped_module.attn.to_q",
    "transformer_blocks.0._checkpoint_wrapped_module.attn.to_q",
    "_orig_mod.transformer_blocks.0._orig_mod.attn.to_q",
    "base_model.model._fsdp_wrapped_module.transformer_blocks.0._checkpoint_wrapped_module.attn.to_q",
    "module.transformer_blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attn.to_q",
)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_in_a_loras_names(
    name: str, tmp_path: Path, model: MMDiT, base: dict[str, Tensor], pair: tuple[Tensor, Tensor]
) -> None:
    tensors = {key.replace(LAYER, name): tensor for key, tensor in product(pair).items()}
    want = base[f"{LAYER}.weight"] + pair[1] @ pair[0]
    torch.testing.assert_close(merged(tmp_path, tensors, model)[f"{LAYER}.weight"], want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
def test_wrappers_in_a_networks_names(wrapper: str, tmp_path: Path, base: dict[str, Tensor]) -> None:
    def wrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], wrapper, *parts[2:]] if parts[0] == "transformer_blocks" else parts)

    for prefix in ("", f"{wrapper}.", f"model.diffusion_model.{wrapper}."):
        save_file({prefix + wrapped(name): tensor for name, tensor in base.items()}, tmp_path / "m.safetensors")
        loaded = load_transformer(tmp_path / "m.safetensors").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("oft_R.weight", "an OFT in peft's form"),
        ("oft_r", "an OFT in peft's form"),
        ("boft_R", "a BOFT"),
        ("a1.weight", "a GLoRA"),
        ("vera_lambda_b", "a VeRA"),
        ("hra_u", "an HRA"),
        ("ia3_l", "an IA3"),
        ("lokr_t2", "an adapter of convolutions"),
        ("hada_t1", "an adapter of convolutions"),
        ("lora_mid.weight", "an adapter of convolutions"),
        ("reshape_weight", "an adapter that changes sizes"),
    ],
)
def test_other_adapters_are_named(key: str, kind: str, tmp_path: Path, pair: tuple[Tensor, Tensor]) -> None:
    save_file({**product(pair), f"{LAYER}.{key}": torch.ones(4)}, tmp_path / "l.safetensors")
    with pytest.raises(LoRAError, match=rf"l\.safetensors is {kind} \({LAYER}\.{key}\), which is not added to weights"):
        read_lora(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("dora_scale", torch.ones(3), r"its DoRA magnitudes \[3\] do not fit \[64, 64\]"),
        ("dora_scale", torch.tensor(1.0), r"its DoRA magnitudes \[\] do not fit \[64, 64\]"),
        (
            "lora_B.bias",
            torch.ones(3),
            r"its biases diff_b \[64\], up_bias \[3\] are of two shapes; fetch the file again",
        ),
        ("oft_blocks", torch.ones(3, 8, 8), "changes .*to_q.weight of shape .24, -1., the model has .64, 64."),
        ("oft_blocks", torch.ones(8, 8, 7), "parts .* do not multiply"),
        ("set_weight", torch.ones(3, 3), "changes .*to_q.weight of shape .3, 3., the model has .64, 64."),
    ],
)
def test_parts_that_do_not_fit(
    part: str, tensor: Tensor, message: str, tmp_path: Path, model: MMDiT, pair: tuple[Tensor, Tensor]
) -> None:
    beside = {**product(pair), f"{LAYER}.diff_b": torch.ones(64)}
    tensors = beside if part in ("dora_scale", "lora_B.bias") else {}
    with pytest.raises(LoRAError, match=message):
        merged(tmp_path, {**tensors, f"{LAYER}.{part}": tensor}, model)


@pytest.mark.parametrize(
    ("part", "tensor", "strength", "message"),
    [
        ("set_weight", torch.ones(64, 64), 0.5, "strength of this LoRA should be 1, got 0.5"),
        ("oft_blocks", torch.zeros(8, 8, 8), -1.0, "strength of this LoRA should be above 0, got -1"),
    ],
)
def test_strengths_that_mean_nothing(
    part: str, tensor: Tensor, strength: float, message: str, tmp_path: Path, model: MMDiT
) -> None:
    with pytest.raises(LoRAError, match=message):
        merged(tmp_path, {f"{LAYER}.{part}": tensor}, model, strength)
