"""DistillLoRA: every naming, against the sums written out and against ComfyUI's own loader; recipes; bad files."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.lora
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import pytest
import torch
import toy
from safetensors.torch import save_file
from torch import Tensor
from unipic_pack.nodes.compare import UniPicCompare
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import RecipeAttachment, attach, attachment_of
from unipic_pack.nodes.lora import BUNDLED, DistillLoRA, file_state, lora_path
from unipic_pack.unipic_core import bundled
from unipic_pack.unipic_core.errors import LoRAError, UniPicError
from unipic_pack.unipic_core.weights.lora import read_lora as read_core_lora
from unipic_pack.unipic_core.weights.lora import save_adapter, save_lora
from unipic_pack.unipic_core.weights.lora_layers import LoRALayer
from unipic_pack.unipic_core.weights.recipe import RELEASED_BASE, Recipe

import nodes as comfy_nodes

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "img_in", "norm_out.linear")
RANK = 4
NAME = "test.safetensors"
STUDENT = Recipe(steps=4, guidance=1.0, sampler="consistency", schedule="few_step", made={"by": "dmd"})

Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Any:
    return load_model(golden / "tiny")


@pytest.fixture(scope="module")
def pairs(tiny: Any) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name in LAYERS:
        out, into = weight(tiny, name).shape
        pairs[name] = tuple(0.3 * torch.randn(s, generator=generator) for s in ((RANK, into), (out, RANK)))
    return pairs  # type: ignore[return-value]


@pytest.fixture
def file() -> Path:
    """Where a LoRA named NAME lies for ComfyUI."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    return folder / NAME


def weight(patcher: Any, name: str, part: str = "weight") -> Tensor:
    """A parameter as the patches of the MODEL make it."""
    key = f"diffusion_model.{name}.{part}"
    value = comfy.utils.get_attr(patcher.model, key).detach().float().clone()
    return comfy.lora.calculate_weight(patcher.patches.get(key, []), value, key)


def apply(patcher: Any, strength: float = 1.0, name: str = NAME) -> Any:
    return DistillLoRA.execute(patcher, name, strength)[0]


def line(patcher: Any) -> str:
    """What the node says."""
    return DistillLoRA.execute(patcher, NAME, 1.0).ui.as_dict()["text"][0]


def assert_added(patcher: Any, base: Any, pairs: Pairs, scale: float = 1.0) -> None:
    assert set(patcher.patches) - set(base.patches) == {f"diffusion_model.{name}.weight" for name in pairs}
    for name, (down, up) in pairs.items():
        torch.testing.assert_close(weight(patcher, name), weight(base, name) + scale * up @ down, atol=1e-6, rtol=1e-6)


# --- namings ---


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str]]:
    return lambda n: (f"{prefix}{n}{down}", f"{prefix}{n}{up}")


def underscored(prefix: str) -> Callable[[str], tuple[str, str]]:
    return lambda n: tuple(f"{prefix}{n.replace('.', '_')}.lora_{s}.weight" for s in ("down", "up"))  # type: ignore[return-value]


STYLES: dict[str, Callable[[str], tuple[str, str]]] = {
    "bare": dotted("", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": dotted("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI": dotted("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
    "peft": dotted("base_model.model.", ".lora_A.weight", ".lora_B.weight"),
    "peft default": dotted("base_model.model.transformer.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "adapter name": dotted("transformer.", ".lora_A.my-style.weight", ".lora_B.my-style.weight"),
    "unet": dotted("unet.", ".lora.down.weight", ".lora.up.weight"),
    "kohya": underscored("lora_unet_"),
    "OneTrainer": underscored("lora_transformer_"),
    "LyCORIS": underscored("lycoris_"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_naming_adds_the_same(style: str, file: Path, tiny: Any, pairs: Pairs) -> None:
    tensors = {}
    for name, pair in pairs.items():
        tensors |= dict(zip(STYLES[style](name), pair, strict=True))
    save_file(tensors, file)
    assert_added(apply(tiny), tiny, pairs)
    assert tiny.patches == {}
    assert line(tiny).startswith("4 of 4 layers of test.safetensors matched; the LoRA has no recipe, so the model's: ")


def save_kohya(file: Path, pairs: Pairs, alpha: float) -> None:
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors |= dict(zip(STYLES["kohya"](name), pair, strict=True))
        tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)


@pytest.mark.parametrize("strength", [1.0, 0.25, -2.0])
def test_alpha_and_strength(strength: float, file: Path, tiny: Any, pairs: Pairs) -> None:
    save_kohya(file, pairs, alpha=3.0)
    assert_added(apply(tiny, strength), tiny, pairs, strength * 3.0 / RANK)


def test_declared_alpha_that_comfyui_would_ignore(file: Path, tiny: Any, pairs: Pairs) -> None:
    """diffusers writes the alpha into the metadata; rank-stabilised ones are divided by the root of the rank."""
    tensors = {k: t for n, p in pairs.items() for k, t in zip(STYLES["diffusers"](n), p, strict=True)}
    declared = '{"transformer.lora_alpha": 8, "transformer.use_rslora": true}'
    save_file(tensors, file, {"lora_adapter_metadata": declared})
    assert_added(apply(tiny), tiny, pairs, 8 / RANK**0.5)


def test_products_of_other_kinds_and_biases(file: Path, tiny: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    out, into = weight(tiny, "img_in").shape
    q_out, q_in = weight(tiny, "transformer_blocks.0.attn.to_q").shape
    w1, w2 = torch.randn(2, 2, generator=generator), torch.randn(q_out // 2, q_in // 2, generator=generator)
    a, b, c, d = (torch.randn(s, generator=generator) for s in ((out, 2), (2, into)) * 2)
    bias = torch.randn(out, generator=generator)
    tensors = {
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": w1,
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": w2,
        **{f"lycoris_img_in.hada_{k}": v for k, v in (("w1_a", a), ("w1_b", b), ("w2_a", c), ("w2_b", d))},
        "lycoris_img_in.alpha": torch.tensor(1.0),
        "lycoris_img_in.diff_b": bias,
        "diffusion_model.transformer_blocks.0.attn.norm_q.diff": torch.ones(
            weight(tiny, "transformer_blocks.0.attn.norm_q").shape
        ),
    }
    save_file(tensors, file)
    got = apply(tiny, 0.5)
    for name, part, delta in (
        ("transformer_blocks.0.attn.to_q", "weight", torch.kron(w1, w2)),
        ("img_in", "weight", (a @ b) * (c @ d) / 2),
        ("img_in", "bias", bias),
        ("transformer_blocks.0.attn.norm_q", "weight", torch.tensor(1.0)),
    ):
        torch.testing.assert_close(
            weight(got, name, part), weight(tiny, name, part) + 0.5 * delta, atol=1e-5, rtol=1e-5
        )


def kinds(tiny: Any, pairs: Pairs) -> dict[str, dict[str, Tensor]]:
    """By kind: an adapter of the first of LAYERS."""
    layer, generator = LAYERS[0], torch.Generator().manual_seed(4)
    down, up = pairs[layer]
    out = len(up)
    plain = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return {
        "dora": {**plain, f"{layer}.dora_scale": torch.linspace(0.5, 2, out)[:, None]},
        "peft dora": {**plain, f"{layer}.lora_magnitude_vector.weight": torch.linspace(0.5, 2, out)},
        "dora of inputs": {**plain, f"{layer}.dora_scale": torch.linspace(0.5, 2, down.shape[1])[None]},
        "oft": {f"{layer}.oft_blocks": 0.1 * torch.randn(8, out // 8, out // 8, generator=generator)},
        "set": {f"{layer}.set_weight": torch.randn(weight(tiny, layer).shape, generator=generator)},
        "bias": {**plain, f"{layer}.lora_B.bias": torch.ones(out), f"{layer}.network_alpha": torch.tensor(2.0)},
        "norm": {"transformer_blocks.0.attn.norm_q.w_norm": torch.ones(32)},
        "wrapped": {
            f"_fsdp_wrapped_module.{k.replace('0.', '0._checkpoint_wrapped_module.')}": t for k, t in plain.items()
        },
    }


KINDS = ("dora", "peft dora", "dora of inputs", "oft", "set", "bias", "norm", "wrapped")


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_as_the_core_applies_it(kind: str, strength: float, file: Path, tiny: Any, pairs: Pairs) -> None:
    save_file({k: t.clone() for k, t in kinds(tiny, pairs)[kind].items()}, file)
    if kind == "set" and strength != 1:
        with pytest.raises(LoRAError, match="strength of this LoRA should be 1, got 0.6"):
            apply(tiny, strength)
        return
    got = apply(tiny, strength)
    names = {n: tuple(p.shape) for n, p in tiny.model.diffusion_model.named_parameters()}
    fitted = read_core_lora(file).fit(names)
    assert fitted.table
    for parameter in fitted.table:
        name, part = parameter.rsplit(".", 1)
        base = weight(tiny, name, part)
        torch.testing.assert_close(
            weight(got, name, part), fitted.apply(parameter, base, strength), atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(weight(got, name, part), base, atol=1e-3)


def trained_kinds(tiny: Any, pairs: Pairs) -> dict[str, LoRALayer]:
    """By adapter.type: an adapter of the first of LAYERS, as the trainers export it."""
    layer, generator = LAYERS[0], torch.Generator().manual_seed(5)
    down, up = pairs[layer]
    out, into = weight(tiny, layer).shape

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    factors = {"lokr_w1": normal(8, 8), "lokr_w2_a": normal(out // 8, 2), "lokr_w2_b": normal(2, into // 8)}
    hadamard = {f"hada_{k}": normal(*s) for k, s in (("w1_a", (out, 2)), ("w1_b", (2, into)))}
    hadamard |= {f"hada_{k}": normal(*s) for k, s in (("w2_a", (out, 2)), ("w2_b", (2, into)))}
    return {
        "dora": LoRALayer({"down": down, "up": up, "dora_scale": torch.linspace(0.5, 2, out)[:, None]}, 8.0),
        "lokr": LoRALayer(factors, 4.0),
        "lokr of full factors": LoRALayer({"lokr_w1": normal(8, 8), "lokr_w2": normal(out // 8, into // 8)}),
        "loha": LoRALayer(hadamard, 4.0),
    }


@pytest.mark.parametrize("kind", ["dora", "lokr", "lokr of full factors", "loha"])
def test_what_the_trainers_export(kind: str, file: Path, tiny: Any, pairs: Pairs) -> None:
    """The node gives the layer's weight; the stock loader gives the same, but divides a DoRA by the base's norms."""
    layer = trained_kinds(tiny, pairs)[kind]
    save_adapter(file, {LAYERS[0]: layer}, recipe=STUDENT)
    ours, stock = apply(tiny), comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(tiny, NAME, 1.0)[0]
    base = weight(tiny, LAYERS[0])
    wanted = layer.applied(base.float(), 1.0)
    torch.testing.assert_close(weight(ours, LAYERS[0]), wanted, atol=2e-2, rtol=1e-2)  # the file is bf16
    assert not torch.allclose(wanted, base, atol=0.1)
    if kind == "dora":
        changed = base + layer.weight_delta()
        wanted = changed * layer.parts["dora_scale"] / base.norm(dim=1, keepdim=True)
        torch.testing.assert_close(weight(stock, LAYERS[0]), wanted, atol=5e-2, rtol=2e-2)
    else:
        torch.testing.assert_close(weight(stock, LAYERS[0]), weight(ours, LAYERS[0]), atol=1e-5, rtol=1e-5)


def test_an_oft_as_the_stock_loader_adds_it(file: Path, tiny: Any, pairs: Pairs) -> None:
    tensors = {f"diffusion_model.{k}": t.clone() for k, t in kinds(tiny, pairs)["oft"].items()}
    save_file(tensors, file)
    # at other strengths the stock patch multiplies by it twice
    ours, stock = apply(tiny), comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(tiny, NAME, 1.0)[0]
    torch.testing.assert_close(weight(ours, LAYERS[0]), weight(stock, LAYERS[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity(ours), velocity(stock), atol=1e-3, rtol=1e-3)


def test_two_namings_of_one_layer_are_both_added(file: Path, tiny: Any, pairs: Pairs) -> None:
    (down, up), name = pairs["norm_out.linear"], "norm_out.linear"
    save_file(
        {
            f"{n}.lora_{s}.weight": t
            for n in (name, "norm_out_linear")
            for s, t in (("A", down.clone()), ("B", up.clone()))
        },
        file,
    )
    assert_added(apply(tiny), tiny, {name: (down, up)}, 2.0)


def test_layers_stack_and_leave_the_first_model_alone(file: Path, tiny: Any, pairs: Pairs) -> None:
    save_kohya(file, pairs, alpha=RANK)
    once = apply(tiny)
    twice = apply(once, 0.5)
    for name, (down, up) in pairs.items():
        torch.testing.assert_close(weight(once, name), weight(tiny, name) + up @ down, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(weight(twice, name), weight(tiny, name) + 1.5 * up @ down, atol=1e-6, rtol=1e-6)


# --- beside ComfyUI's own loader ---


def velocity(patcher: Any) -> Tensor:
    """One evaluation through ComfyUI's sampling."""
    noise = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.0])
    conds = [[[text, {}]]] * 2
    return comfy.sample.sample_custom(
        patcher, noise, 1.0, sampler, sigmas, *conds, torch.zeros_like(noise), disable_pbar=True, seed=0
    )


@pytest.mark.parametrize("dtype", ["as stored", "bf16", "fp8"])
def test_our_files_are_the_same_through_the_stock_loader(dtype: str, file: Path, golden: Path, pairs: Pairs) -> None:
    model = load_model(golden / "tiny", dtype)
    save_lora(file, pairs, alpha=2 * RANK, recipe=STUDENT)
    ours, stock = apply(model, 0.7), comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(model, NAME, 0.7)[0]
    assert ours.patches.keys() == stock.patches.keys()
    for name in LAYERS:
        assert torch.equal(weight(ours, name), weight(stock, name))
    changed, plain = velocity(ours), velocity(model)
    assert torch.equal(changed, velocity(stock))
    assert float((changed - plain).abs().max()) > 0.01
    assert torch.equal(velocity(model), plain)  # the patches are taken out again


# --- recipes ---


def test_the_recipe_goes_over_the_models(file: Path, tiny: Any, pairs: Pairs) -> None:
    base = tiny.clone()
    attach(base, RecipeAttachment(RELEASED_BASE, attachment_of(tiny).shift))
    save_lora(file, pairs, recipe=STUDENT)
    got = apply(base)
    assert attachment_of(got).recipe == RELEASED_BASE.merge(STUDENT)
    assert attachment_of(got).shift == attachment_of(tiny).shift
    assert attachment_of(base).recipe == RELEASED_BASE
    settings = "4 steps, consistency, no guidance"
    assert line(base) == f"4 of 4 layers of test.safetensors matched; the LoRA's recipe: {settings}"


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((96, 64), True), ((None, 64), True), ((1024, 1024), False), ((128, 96), False), ((None, None), False)],
)
def test_other_sizes_are_told(sizes: tuple[Any, Any], told: bool, file: Path, tiny: Any, pairs: Pairs) -> None:
    """Multi-Image Compose plans with the CLIP's recipe unless this MODEL is connected to it."""
    base = tiny.clone()
    if sizes[0] != 1024:  # else the model has no sizes, so 1024
        attach(base, RecipeAttachment(Recipe(reference_budget=128, output_budget=96)))
    save_lora(file, pairs, recipe=replace(STUDENT, reference_budget=sizes[0], output_budget=sizes[1]))
    advice = "pixels: connect this model to model of Multi-Image Compose too"
    assert line(base).endswith(advice) == told
    if told:
        trained = f"{sizes[0] or 128}x{sizes[0] or 128} and pictures of 64x64 {advice}"
        assert line(base).endswith(f"no guidance; trained for references of {trained}")


def test_strength_zero_changes_nothing(file: Path, tiny: Any, pairs: Pairs) -> None:
    save_lora(file, pairs, recipe=STUDENT)
    assert apply(tiny, 0.0) is tiny


def test_an_attention_form_that_is_not_there_yet(file: Path, tiny: Any, pairs: Pairs) -> None:
    save_lora(file, pairs, recipe=Recipe(attention_form="cached"))
    with pytest.raises(UniPicError, match="expected the attention form .* got 'cached'"):
        apply(tiny)


def test_a_recipe_that_is_wrong(file: Path, tiny: Any, pairs: Pairs) -> None:
    save_lora(file, pairs, metadata={"unipic_recipe": '{"steps": "many"}'})
    with pytest.raises(LoRAError, match=r"test\.safetensors: the recipe's steps should be a whole number"):
        apply(tiny)


# --- what does not fit ---


def test_partly_matched_is_a_warning(file: Path, tiny: Any, pairs: Pairs, caplog: pytest.LogCaptureFixture) -> None:
    strange = {f"transformer_blocks.{i}.attn.to_q": pairs["img_in"] for i in range(90, 94)}
    save_lora(file, {**pairs, **strange})
    text = line(tiny)
    assert text.startswith("4 of 8 layers of test.safetensors matched; not in this model: transformer_blocks.9")
    assert ", ...; the LoRA has" in text
    assert [r.levelname for r in caplog.records if text in r.getMessage()] == ["WARNING"]


def test_none_matched_names_both_sides(file: Path, tiny: Any) -> None:
    save_lora(file, {"double_blocks.0.img_attn.qkv": (torch.zeros(4, 8), torch.zeros(8, 4))})
    expected = (
        r"none of the 1 layers of test\.safetensors .*'double_blocks\.0\.img_attn\.qkv', the model's first is '\w+"
    )
    with pytest.raises(LoRAError, match=expected):
        apply(tiny)


def test_a_lora_of_the_same_architecture_in_another_size(file: Path, tiny: Any) -> None:
    save_lora(file, {LAYERS[0]: (torch.zeros(4, 3072), torch.zeros(3072, 4))})
    with pytest.raises(LoRAError, match=r"shape \[3072, 3072\], the model has .* choose a LoRA"):
        apply(tiny)
    assert tiny.patches == {}


def test_a_model_of_another_architecture(file: Path, pairs: Pairs) -> None:
    save_lora(file, pairs)
    with pytest.raises(LoRAError, match=r"none of the 4 layers .* the model's first is 'weight'"):
        apply(toy.model())


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(folder_paths.get_folder_paths("loras")[0]) / "ran",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.safetensors", b"not a lora"),
        ("cut.safetensors", (200).to_bytes(8, "little") + b'{"a": '),
        ("empty.safetensors", b""),
        ("page.pt", b"<html>not found</html>"),
        ("evil.pt", pickle.dumps(Evil())),
        ("number.pt", pickle.dumps(5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(name: str, content: bytes, file: Path, tiny: Any) -> None:
    path = file.with_name(name)
    path.write_bytes(content)
    with pytest.raises(LoRAError, match=rf"{name} cannot be read as a LoRA \(.*\); it is damaged: download it again"):
        apply(tiny, name=name)
    assert not path.with_name("ran").exists()
    path.unlink()


def test_a_checkpoint_is_no_lora(file: Path, tiny: Any) -> None:
    save_file({"img_in.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(LoRAError, match="holds no LoRA layer among 1 tensors"):
        apply(tiny)


# --- the node ---


def test_bundled_loras_are_listed_and_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path, tiny: Any, pairs: Pairs
) -> None:
    monkeypatch.setattr(bundled, "MODELS", tmp_path)
    (tmp_path / "nano" / "loras").mkdir(parents=True)
    save_lora(tmp_path / "nano" / "loras" / "few.safetensors", pairs)
    save_lora(file, pairs)
    listed = DistillLoRA.define_schema().inputs[1].options
    assert listed[0] == "bundled: nano/few.safetensors"
    assert NAME in listed
    assert_added(
        apply(tiny, name=listed[0]),
        tiny,
        {n: (d.bfloat16().float(), u.bfloat16().float()) for n, (d, u) in pairs.items()},
    )
    with pytest.raises(LoRAError, match=r"the pack has no LoRA 'nano/gone\.safetensors'; choose another"):
        apply(tiny, name="bundled: nano/gone.safetensors")
    with pytest.raises(LoRAError, match=r"there is no LoRA 'gone\.safetensors' in ComfyUI's models/loras"):
        apply(tiny, name="gone.safetensors")


@pytest.mark.parametrize("earlier", bundled.RENAMED)
def test_a_saved_workflow_may_name_a_bundled_lora_as_it_was_called(earlier: str) -> None:
    file = lora_path(BUNDLED + earlier)
    assert file.is_file()
    assert file.name == Path(bundled.RENAMED[earlier]).name
    for node in (DistillLoRA, UniPicCompare):
        assert node.validate_inputs(BUNDLED + earlier) is True
        assert node.fingerprint_inputs(lora=BUNDLED + earlier) == file_state(BUNDLED + bundled.RENAMED[earlier])
        assert "there is no LoRA" in node.fingerprint_inputs(lora="gone.safetensors")


def test_a_replaced_file_is_read_again(file: Path, pairs: Pairs) -> None:
    save_lora(file, pairs)
    before = DistillLoRA.fingerprint_inputs(lora=NAME, strength=1.0, model=None)
    assert DistillLoRA.fingerprint_inputs(lora=NAME, strength=1.0, model=None) == before
    save_lora(file, {"img_in": pairs["img_in"]})
    assert DistillLoRA.fingerprint_inputs(lora=NAME, strength=1.0, model=None) != before


def test_the_line_is_shown_in_the_node(monkeypatch: pytest.MonkeyPatch, file: Path, tiny: Any, pairs: Pairs) -> None:
    save_lora(file, pairs)
    shown = []
    server = SimpleNamespace(client_id="page", send_progress_text=lambda *message: shown.append(message))
    page = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", page)
    monkeypatch.setattr(DistillLoRA, "hidden", SimpleNamespace(unique_id="12"))
    text = line(tiny)
    assert shown == [(text, "12", "page")]


def test_schema() -> None:
    schema = DistillLoRA.define_schema()
    assert (schema.node_id, schema.category) == ("DistillLoRA", "UniPic")
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
