"""LoRAs: every naming reads the same, merging is exact, what does not fit is named, others read what we write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.paths import TINY
from unipic_core.errors import LoRAError
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.lora import (
    LORA_KEY,
    apply_to_weights,
    build_lora,
    common_targets,
    merge_lora,
    read_lora,
    save_lora,
)
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import load_transformer

RANK = 4
LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.0.img_mlp.net.0.proj",
    "transformer_blocks.0.img_mlp.net.2",
    "transformer_blocks.1.img_mod.1",
    "norm_out.linear",
    "img_in",
)


@pytest.fixture
def model() -> MMDiT:
    return load_transformer(TINY)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (down [r, in], up [out, r])."""
    shapes = {n: p.shape for n, p in load_transformer(TINY).named_parameters()}
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=g) * 0.1  # noqa: E731
    return {n: (draw(RANK, shapes[n + ".weight"][1]), draw(shapes[n + ".weight"][0], RANK)) for n in LAYERS}


def weights_of(model: MMDiT) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def expect(before: dict[str, Tensor], pairs: dict[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    return {
        n: w + scale * (pairs[n[:-7]][1] @ pairs[n[:-7]][0]) if n.endswith(".weight") and n[:-7] in pairs else w
        for n, w in before.items()
    }


def assert_same(model: MMDiT, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=tolerance, rtol=0, msg=name)


def dotted(prefix: str, down: str, up: str) -> Callable[[str], tuple[str, str]]:
    return lambda n: (f"{prefix}{n}{down}", f"{prefix}{n}{up}")


def underscored(prefix: str) -> Callable[[str], tuple[str, str]]:
    return lambda n: tuple(f"{prefix}{n.replace('.', '_')}.lora_{s}.weight" for s in ("down", "up"))  # type: ignore[return-value]


def old_diffusers(n: str) -> tuple[str, str]:
    n = n.removesuffix(".0").replace(".attn.", ".attn.processor.")
    return f"unet.{n}_lora.down.weight", f"unet.{n}_lora.up.weight"


STYLES: dict[str, Callable[[str], tuple[str, str]]] = {
    **{
        f"{prefix or 'bare'}": dotted(prefix, ".lora_A.weight", ".lora_B.weight")
        for prefix in (
            *("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet."),
            *("base_model.model.transformer.", "transformer.base_model.model."),
        )
    },
    "default": dotted("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "adapter name": dotted("transformer.", ".lora_A.my-style_1.weight", ".lora_B.my-style_1.weight"),
    "peft default": dotted("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "no .weight": dotted("", ".lora_A", ".lora_B"),
    "down up": dotted("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
    "lora.down": dotted("transformer.", ".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": dotted("", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    **{p: underscored(p) for p in ("lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_", "lora_")},
    "old diffusers": old_diffusers,
}


@pytest.mark.parametrize("style", STYLES)
def test_every_naming_reads_the_same(
    style: str, tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        for key, tensor in zip(STYLES[style](name), (down, up), strict=True):
            tensors[key] = tensor
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = expect(weights_of(model), pairs)
    report = merge_lora(model, read_lora(tmp_path / "lora.safetensors"))
    assert report.matched == len(LAYERS)
    assert report.unmatched == ()
    assert_same(model, expected)


def save_kohya(path: Path, pairs: dict[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    save_file(tensors, path)


def test_alpha_strength_and_unmerging(tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    save_kohya(tmp_path / "l.safetensors", pairs, alpha=2.0)
    before, lora = weights_of(model), read_lora(tmp_path / "l.safetensors")
    merge_lora(model, lora, 0.5)
    assert_same(model, expect(before, pairs, 0.5 * 2.0 / RANK))
    merge_lora(model, lora, -0.5)
    assert_same(model, before)
    merge_lora(model, lora, 0)
    assert_same(model, before)


def test_the_sum_is_rounded_once_to_the_weights_type(tmp_path: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    model = load_transformer(TINY, dtype=torch.bfloat16)
    before = weights_of(model)
    save_kohya(tmp_path / "l.safetensors", pairs, alpha=RANK)
    merge_lora(model, read_lora(tmp_path / "l.safetensors"))
    expected = expect({n: w.float() for n, w in before.items()}, pairs)
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        torch.testing.assert_close(parameter.detach(), expected[name].bfloat16(), atol=1e-3, rtol=8e-3)


def test_metadata_of_diffusers_gives_the_alpha(
    tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    tensors = {k: t for n, p in pairs.items() for k, t in zip(STYLES["transformer."](n), p, strict=True)}
    declared = {
        "transformer.lora_alpha": 8,
        "transformer.r": RANK,
        "transformer.use_rslora": True,
        "transformer.alpha_pattern": {r"^img_(in|out)": 2, "in": 5},
    }
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(declared)})
    before = weights_of(model)
    merge_lora(model, read_lora(tmp_path / "l.safetensors"))
    expected = expect(before, pairs, 8 / RANK**0.5)
    expected["img_in.weight"] = before["img_in.weight"] + 2 / RANK**0.5 * (pairs["img_in"][1] @ pairs["img_in"][0])
    assert_same(model, expected, 1e-5)


@pytest.mark.parametrize("settings", [{"lora_alpha": 10**400}, {"lora_alpha": 1, "alpha_pattern": {"img_in": 10**400}}])
def test_an_alpha_too_large_for_a_number_is_one_sentence(settings: dict[str, object]) -> None:
    keys = ["img_in.lora_A.weight", "img_in.lora_B.weight"]
    with pytest.raises(LoRAError, match="the adapter settings of l are not readable; fetch the file again"):
        build_lora(keys, lambda key: torch.ones(2, 2), Path("l"), {"lora_adapter_metadata": json.dumps(settings)})


def one_layer(
    tmp_path: Path, tensors: dict[str, Tensor], prefix: str = "lycoris_transformer_blocks_0_attn_to_q."
) -> Path:
    save_file({prefix + n: t for n, t in tensors.items()}, tmp_path / "l.safetensors")
    return tmp_path / "l.safetensors"


def test_lokr_and_loha_and_differences(tmp_path: Path, model: MMDiT) -> None:
    """Against LyCORIS's definitions: kron(w1, w2), (a b) * (c d), times alpha / rank where a factor has a rank; also
    stored as 1x1 convolutions."""
    name = "transformer_blocks.0.attn.to_q"
    base = weights_of(model)[f"{name}.weight"]
    g = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(size, generator=g)  # noqa: E731
    w1, w2, a, b = draw(8, 8), draw(8, 8), draw(8, 2), draw(2, 8)
    one, two, three, four = draw(64, 2), draw(2, 64), draw(64, 2), draw(2, 64)
    cases: list[tuple[dict[str, Tensor], Tensor]] = [
        ({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, torch.kron(w1, w2)),
        ({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}, torch.kron(w1, a @ b) / 2),
        ({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": w2}, torch.kron(a @ b, w2)),
        (
            {"hada_w1_a": one, "hada_w1_b": two, "hada_w2_a": three, "hada_w2_b": four, "alpha": torch.tensor(4.0)},
            (one @ two) * (three @ four) * 2,
        ),
        ({"diff": draw(64, 64)}, torch.zeros(0)),
    ]
    cases[-1] = (cases[-1][0], cases[-1][0]["diff"])
    for tensors, delta in cases:
        convolution = {
            part: t[..., None, None] if "lokr" in part or "hada" in part else t for part, t in tensors.items()
        }
        for stored in (tensors, convolution):
            lora = read_lora(one_layer(tmp_path, stored))
            fresh = load_transformer(TINY)
            assert merge_lora(fresh, lora).matched == 1
            got = fresh.get_parameter(f"{name}.weight").detach() - base
            torch.testing.assert_close(got, delta, atol=2e-5, rtol=1e-5)


def test_bias_and_norm_differences(tmp_path: Path, model: MMDiT) -> None:
    before = weights_of(model)
    tensors = {
        "diffusion_model.img_in.diff_b": torch.ones(64),
        "diffusion_model.transformer_blocks.0.attn.norm_q.diff": torch.ones(32),
    }
    save_file(tensors, tmp_path / "l.safetensors")
    merge_lora(model, read_lora(tmp_path / "l.safetensors"), 2.0)
    changed = {"img_in.bias": 2.0, "transformer_blocks.0.attn.norm_q.weight": 2.0}
    assert_same(model, {n: w + changed.get(n, 0.0) for n, w in before.items()})


def test_a_stream_of_weights(tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    save_kohya(tmp_path / "l.safetensors", pairs, alpha=RANK)
    lora, before = read_lora(tmp_path / "l.safetensors"), weights_of(model)
    shapes = {n: tuple(w.shape) for n, w in before.items()}
    streamed = dict(apply_to_weights(lora.fit(shapes), before.items(), 0.7))
    merge_lora(model, lora, 0.7)
    assert_same(model, streamed)
    assert common_targets(lora)["attn_to_q"] == 1
    assert lora.ranks == (RANK,)


def test_a_stream_stops_at_a_sum_that_is_not_finite(tmp_path: Path, model: MMDiT) -> None:
    down = torch.full((2, 64), float("inf"))
    lora = read_lora(one_layer(tmp_path, {"lora_A.weight": down, "lora_B.weight": torch.ones(64, 2)}))
    shapes = {n: tuple(w.shape) for n, w in model.named_parameters()}
    with pytest.raises(LoRAError, match=r"transformer_blocks\.0\.attn\.to_q\.weight holds NaN or infinity"):
        dict(apply_to_weights(lora.fit(shapes), weights_of(model).items()))


# --- what does not fit ---


def test_nothing_matched_is_an_error(tmp_path: Path, model: MMDiT) -> None:
    down_up = {"lora_A.weight": torch.zeros(4, 8), "lora_B.weight": torch.zeros(8, 4)}
    file = one_layer(tmp_path, down_up, "double_blocks.0.img_attn.qkv.")
    with pytest.raises(LoRAError, match=r"none of the 1 layers of l\.safetensors.*double_blocks.*choose a LoRA"):
        merge_lora(model, read_lora(file))


def test_unmatched_layers_and_unread_keys_are_reported(tmp_path: Path, model: MMDiT) -> None:
    tensors = {
        "img_in.lora_A.weight": torch.zeros(4, 16),
        "img_in.lora_B.weight": torch.zeros(64, 4),
        "text_encoder.layers.0.q.lora_A.weight": torch.zeros(4, 8),
        "text_encoder.layers.0.q.lora_B.weight": torch.zeros(8, 4),
        "transformer_blocks.9.attn.to_q.lora_A.weight": torch.zeros(4, 64),
        "strange": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "l.safetensors")
    report = merge_lora(model, read_lora(tmp_path / "l.safetensors"))
    assert report.matched == 1
    assert set(report.unmatched) == {
        "text_encoder.layers.0.q",
        "transformer_blocks.9.attn.to_q.down",
        "strange",
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.img_in.lora_A.one.weight", "transformer.img_in.lora_A.two.weight"),
        ("transformer.img_in.lora_A.weight", "diffusion_model.img_in.lora_down.weight"),
        ("img_in.alpha", "img_in.network_alpha"),
    ],
)
def test_two_adapters_in_one_file_are_refused(first: str, second: str) -> None:
    keys = [first, second, "img_in.lora_B.one.weight", "img_in.lora_B.two.weight"]
    part = "alpha" if "alpha" in first else "down"
    message = f"^l holds two adapters: {first} and {second} are both the {part} of layer img_in; save each in a file of"
    with pytest.raises(LoRAError, match=message):
        build_lora(keys, lambda key: torch.ones(2, 2), Path("l"), {})


def test_wrong_shapes_name_the_layer_and_both_shapes(tmp_path: Path, model: MMDiT) -> None:
    down_up = {"lora_down.weight": torch.zeros(4, 3072), "lora_up.weight": torch.zeros(3072, 4)}
    before = weights_of(model)
    with pytest.raises(LoRAError, match=r"transformer_blocks_0_attn_to_q.*\[3072, 3072\], the model has \[64, 64\]"):
        merge_lora(model, read_lora(one_layer(tmp_path, down_up)))
    tensors = {"diff": torch.zeros(64)}
    with pytest.raises(LoRAError, match=r"norm1.*no such parameter|none of"):
        merge_lora(model, read_lora(one_layer(tmp_path, tensors, "transformer_blocks.0.img_norm1.")))
    assert_same(model, before, 0)


def test_parts_that_do_not_multiply(tmp_path: Path, model: MMDiT) -> None:
    down_up = {"lora_down.weight": torch.zeros(4, 64), "lora_up.weight": torch.zeros(64, 5)}
    with pytest.raises(LoRAError, match=r"to_q: its low-rank parts down \[4, 64\], up \[64, 5\] do not multiply"):
        merge_lora(model, read_lora(one_layer(tmp_path, down_up)))
    with pytest.raises(LoRAError, match="LoKr parts"):
        merge_lora(
            model, read_lora(one_layer(tmp_path, {"lokr_w1_a": torch.zeros(8, 2), "lokr_w2": torch.zeros(8, 8)}))
        )


def test_a_layer_that_does_not_fit_leaves_the_others_alone(
    tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    wrong = {**pairs, "norm_out.linear": (torch.zeros(4, 3), torch.zeros(3, 4))}
    save_kohya(tmp_path / "l.safetensors", wrong, RANK)
    before = weights_of(model)
    with pytest.raises(LoRAError, match="norm_out"):
        merge_lora(model, read_lora(tmp_path / "l.safetensors"))
    assert_same(model, before, 0)


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match="holds no LoRA layer among 75|holds no LoRA layer"):
        read_lora(TINY / "transformer")
    with pytest.raises(LoRAError, match="there is no file"):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(LoRAError, match="alpha .* one number"):
        read_lora(one_layer(tmp_path, {"lora_A.weight": torch.zeros(4, 4), "alpha": torch.zeros(3)}))
    save_file({"a.lora_A.weight": torch.zeros(1)}, tmp_path / "m.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(LoRAError, match="adapter settings"):
        read_lora(tmp_path / "m.safetensors")


# --- export ---


def test_what_is_saved_reads_back(tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    file = tmp_path / "out.safetensors"
    recipe = Recipe(steps=8, sampler="consistency", made={"by": "dmd"})
    save_lora(file, pairs, alpha=2 * RANK, recipe=recipe, metadata={"title": "test"})
    tensors = load_file(file)
    assert set(tensors) == {f"transformer.{n}.lora_{s}.weight" for n in LAYERS for s in "AB"}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    with safe_open(file, "pt") as f:
        assert f.metadata()["format"] == "pt"
        assert f.metadata()["title"] == "test"
        said = json.loads(f.metadata()[LORA_KEY])
        assert said == {"ranks": [RANK], "alpha": 2 * RANK, "alpha_is_in_the_weights": True}
    lora = read_lora(file)
    assert lora.recipe == recipe
    before = weights_of(model)
    merge_lora(model, lora)
    rounded = {n: (down.bfloat16().float(), up.mul(2).bfloat16().float()) for n, (down, up) in pairs.items()}
    assert_same(model, expect(before, rounded))


def test_saving_nothing_or_parts_that_do_not_multiply(tmp_path: Path) -> None:
    with pytest.raises(LoRAError, match="at least one layer"):
        save_lora(tmp_path / "o.safetensors", {})
    with pytest.raises(LoRAError, match="do not multiply"):
        save_lora(tmp_path / "o.safetensors", {"img_in": (torch.zeros(4, 8), torch.zeros(8, 5))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "patterns",
    [
        {"img_in": 3},
        # sorted, since peft sorts them when it saves
        {r"(attn|ff)\.to_q": 12, "img_in": 5, r"transformer_blocks\.\d+\..*": 1},
        {r".*net\.2": 7, r"^img_[a-z]+$": 9, "^transformer_blocks.1.attn.to_q": 12, "to_.": 2},
    ],
)
def test_a_peft_adapter_folder_merges_as_peft_does(patterns: dict[str, int], tmp_path: Path, model: MMDiT) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "net.2", "img_in"],
        alpha_pattern=patterns,
        init_lora_weights=False,
        use_rslora=True,
    )
    before = load_transformer(TINY)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = weights_of(adapted.merge_and_unload())
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        fresh = load_transformer(TINY)
        report = merge_lora(fresh, read_lora(path))
        assert report.unmatched == ()
        assert_same(fresh, expected, 1e-5)
    assert not torch.equal(before.img_in.weight, expected["img_in.weight"])


@pytest.mark.parametrize("alpha", [0.5 * RANK, RANK, 3.0 * RANK, None])
def test_every_program_adds_the_same_delta_whatever_the_alpha(
    alpha: float | None, tmp_path: Path, model: MMDiT, pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Our reader, diffusers' with peft, and a reader that knows no alpha at all; `up` and `down` are in bf16."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    file = tmp_path / "l.safetensors"
    save_lora(file, pairs, alpha=alpha)
    stored, before = load_file(file), weights_of(model)
    scale = 1.0 if alpha is None else alpha / RANK
    theirs = diffusers.QwenImageTransformer2DModel.from_pretrained(TINY / "transformer")
    theirs.load_lora_adapter(str(file), prefix="transformer")
    theirs.fuse_lora()
    merge_lora(model, read_lora(file))
    for name in LAYERS:
        down, up = (stored[f"transformer.{name}.lora_{side}.weight"].float() for side in "AB")
        asked = scale * pairs[name][1] @ pairs[name][0]
        torch.testing.assert_close(up @ down, asked, atol=2**-7 * float(asked.abs().max()), rtol=0)
        plain = before[f"{name}.weight"] + up @ down
        ours = model.get_parameter(f"{name}.weight").detach()
        fused = theirs.get_submodule(name)
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
        torch.testing.assert_close(getattr(fused, "base_layer", fused).weight.detach(), plain, atol=1e-6, rtol=0)
