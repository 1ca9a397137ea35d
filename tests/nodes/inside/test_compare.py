"""Compare: each cell is the picture of Few-Step Sampler and VAE Decode; an interrupted grid resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.ops
import folder_paths
import node_helpers
import pytest
import torch
from causal_tools import build, conditioning
from comfy.cli_args import PerformanceFeature, args
from comfy.ldm.modules.attention import attention_basic
from comfy.patcher_extension import WrappersMP
from compose_tools import image
from compose_tools import run as compose
from model_tools import lora_file, random_inputs
from safetensors.torch import save_file
from torch import Tensor
from unipic_pack.nodes.compare import UniPicCompare
from unipic_pack.nodes.host.compare import keys
from unipic_pack.nodes.host.compare import run as running
from unipic_pack.nodes.host.compare.axes import Cell, parsed_axis
from unipic_pack.nodes.host.compare.keys import Digest, NoKey, model_key
from unipic_pack.nodes.host.compare.store import FOLDER, CellStore
from unipic_pack.nodes.host.model.kv_cache import with_kv_cache
from unipic_pack.nodes.host.model.latent_format import PictureLatents
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.pictures.vae import load_vae
from unipic_pack.nodes.host.sampling.choices import Widgets
from unipic_pack.nodes.host.text.encoder import load_clip
from unipic_pack.nodes.lora import BUNDLED, add_lora, lora_names, lora_path, read_lora
from unipic_pack.nodes.sample import FewStepSampler
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.vae import read_vae_config

import nodes as stock

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("inference")

SHORT = {"seed": 5, "steps": 2, "cfg": 1.0, "sampler": "consistency", "denoise": 1.0}
AXES = {"x_axis": "none", "x_values": "", "y_axis": "none", "y_values": ""}
[LORA] = [name for name in lora_names() if name.startswith(BUNDLED)]


@pytest.fixture(scope="module")
def vae(nano: Path) -> Any:
    return load_vae(nano)


@pytest.fixture(autouse=True)
def output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path / FOLDER


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the runs that the node samples."""
    seeds: list[int] = []
    original = running.sample

    def watched(model: Any, positive: Any, negative: Any, latent: Any, seed: int, *others: Any) -> Any:
        seeds.append(seed)
        return original(model, positive, negative, latent, seed, *others)

    monkeypatch.setattr(running, "sample", watched)
    return seeds


def sockets(model: Any, vae: Any, **changes: Any) -> dict[str, Any]:
    x, text, references = random_inputs()
    positive, negative = conditioning(text, references), conditioning(text[:, :4] * -0.5, references)
    inputs = {"model": model, "positive": positive, "negative": negative, "latent": {"samples": torch.zeros_like(x)}}
    return {**inputs, "vae": vae, **changes}


def compare(model: Any, vae: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """Grid, and pictures [N, H, W, 3]."""
    return UniPicCompare.execute(**{**sockets(model, vae), **SHORT, **AXES, **changes}).args


def alone(model: Any, vae: Any, **changes: Any) -> Tensor:
    """The picture of the sampler and the stock decoder."""
    inputs = sockets(model, vae)
    del inputs["vae"]
    latent = FewStepSampler.execute(**{**inputs, **SHORT, **changes})[0]
    return stock.VAEDecode().decode(vae, latent)[0]


def test_every_cell_is_the_picture_of_the_single_sampler(nano_model: Any, vae: Any) -> None:
    """Rows of guidance, columns of seeds, to the bit."""
    axes = {"x_axis": "seed", "x_values": "1, 2 3", "y_axis": "guidance", "y_values": "1;2.5"}
    grid, images = compare(nano_model, vae, **axes)
    singles = [alone(nano_model, vae, seed=seed, cfg=cfg) for cfg in (1.0, 2.5) for seed in (1, 2, 3)]
    assert torch.equal(images, torch.cat(singles))
    assert grid.shape[0] == 1
    assert grid.shape[1] > 2 * images.shape[1]
    assert grid.shape[2] > 3 * images.shape[2]
    assert len({image.numpy().tobytes() for image in images}) == 6


@pytest.mark.parametrize(("axis", "values", "widget"), [("steps", [1, 3], "steps"), ("seed", [0, 2**64 - 1], "seed")])
def test_axes_of_widgets(axis: str, values: list[int], widget: str, nano_model: Any, vae: Any) -> None:
    _, images = compare(nano_model, vae, y_axis=axis, y_values=", ".join(map(str, values)))
    assert torch.equal(images, torch.cat([alone(nano_model, vae, **{widget: value}) for value in values]))


@pytest.mark.parametrize(
    ("axis", "values", "labels"),
    [
        ("seed", "123456789012345, 18446744073709551615", ["seed 123456789012345", "seed 18446744073709551615"]),
        ("steps", "4", ["steps 4"]),
        ("reference_budget", "1024", ["budget 1024"]),
        ("guidance", "1, 2.50", ["guidance 1", "guidance 2.5"]),
        ("lora_strength", "-0.1", ["LoRA -0.1"]),
    ],
)
def test_labels_tell_values_apart(axis: str, values: str, labels: list[str]) -> None:
    assert parsed_axis("x", axis, values).labels == labels


def test_strengths_of_a_lora(nano_model: Any, vae: Any) -> None:
    """With the LoRA's recipe, as Distill LoRA gives it; 0 is the model alone, with the model's recipe."""
    settings = {"steps": 0, "cfg": 0.0, "sampler": "auto"}
    before = alone(nano_model, vae)
    _, images = compare(nano_model, vae, **settings, x_axis="lora_strength", x_values="1, 0, 0.5", lora=LORA)
    lora = read_lora(lora_path(LORA))
    models = [add_lora(nano_model, lora, 1.0)[0], nano_model, add_lora(nano_model, lora, 0.5)[0]]
    assert torch.equal(images, torch.cat([alone(model, vae, **settings) for model in models]))
    assert torch.equal(alone(nano_model, vae), before), "the model is as it was"


def test_a_replaced_lora_is_read_again_and_unmatched_layers_are_told(
    nano_model: Any, vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "replaced.safetensors"
    axis = {"x_axis": "lora_strength", "x_values": "1", "lora": file.name}
    layers = lora_file("transformer.{}.lora_{}.weight")
    save_file(layers, file)
    before = UniPicCompare.fingerprint_inputs(**axis)
    assert UniPicCompare.fingerprint_inputs(**axis) == before
    assert UniPicCompare.fingerprint_inputs(lora="none") is None
    compare(nano_model, vae, **axis)
    assert "layers of" not in caplog.text
    strange = {name.replace("blocks.0.", "blocks.90."): tensor.clone() for name, tensor in layers.items()}
    save_file({**layers, **strange}, file)
    assert UniPicCompare.fingerprint_inputs(**axis) != before
    compare(nano_model, vae, **axis)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("12 of 14 layers of replaced.safetensors matched; not in this model" in line for line in told)
    file.unlink()


def test_reference_budgets(nano_model: Any, vae: Any, nano: Path, sampled: list[int]) -> None:
    """As Multi-Image Compose encodes the pictures at each budget."""
    clip = load_clip(nano)
    pictures = {"width": 64, "height": 64}

    def composed(budget: int) -> dict[str, Any]:
        positive, negative, latent = compose((clip, vae), image(0), image(1), reference_budget=budget, **pictures)[:3]
        return {"positive": positive, "negative": negative, "latent": latent}

    axes = {"x_axis": "reference_budget", "x_values": "64, 96"}
    _, images = compare(nano_model, vae, **composed(128), **axes)
    singles = []
    for budget in (64, 96):
        inputs = composed(budget)
        latent = FewStepSampler.execute(nano_model, **inputs, **SHORT)[0]
        singles.append(stock.VAEDecode().decode(vae, latent)[0])
    assert torch.equal(images, torch.cat(singles))
    assert not torch.equal(*images)
    compare(nano_model, vae, **composed(128), **axes)
    assert len(sampled) == 2, "stored"
    changed = composed(128)
    changed["positive"] = node_helpers.conditioning_set_values(changed["positive"], {"strength": 0.5})
    with pytest.raises(UniPicError, match="must come straight from one Multi-Image Compose"):
        compare(nano_model, vae, **changed, **axes)
    with pytest.raises(UniPicError, match="the reference budget must be"):
        compare(nano_model, vae, **composed(128), **{**axes, "x_values": "1"})


def test_finished_pictures_come_from_the_disk(nano_model: Any, vae: Any, nano: Path, sampled: list[int]) -> None:
    """Also for the same weights loaded again, as after a restart, and after a run with a LoRA."""
    axes = {"x_axis": "seed", "x_values": "1, 2"}
    _, first = compare(nano_model, vae, **axes)
    assert sampled == [1, 2]
    alone(add_lora(nano_model, build(lora_file("transformer.{}.lora_{}.weight")), 1.0)[0], vae)
    for model, decoder in ((nano_model, vae), (load_model(nano), load_vae(nano))):
        _, again = compare(model, decoder, **{**axes, "x_values": "2, 1"})
        assert torch.equal(again, first.flip(0))
    assert sampled == [1, 2]
    compare(nano_model, vae, **{**axes, "x_values": "1, 2, 3"})
    assert sampled == [1, 2, 3], "a longer axis samples the new values only"


def test_an_interrupted_grid_goes_on(
    nano_model: Any, vae: Any, sampled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"x_axis": "seed", "x_values": "1, 2, 3"}
    check, calls = management.throw_exception_if_processing_interrupted, []

    def interrupt() -> None:
        calls.append(len(sampled))
        if len(sampled) == 2:
            raise management.InterruptProcessingException
        check()

    with monkeypatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(management.InterruptProcessingException):
            compare(nano_model, vae, **axes)
    assert sampled == [1, 2]
    _, images = compare(nano_model, vae, **axes)
    assert sampled == [1, 2, 2, 3]
    assert torch.equal(images, torch.cat([alone(nano_model, vae, seed=seed) for seed in (1, 2, 3)]))


def test_stored_pictures_lie_where_new_ones_do(nano_model: Any, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --gpu-only new ones are on the GPU."""
    compare(nano_model, vae)
    inputs = running.Sockets(**sockets(nano_model, vae), denoise=1.0, with_lora=lambda _: nano_model)
    comparison = running.Comparison(inputs, CellStore(), [])
    monkeypatch.setattr(management, "intermediate_device", lambda: torch.device("meta"))
    [picture] = comparison.pictures([Cell(5, Widgets(2, 1.0, "consistency"))], lambda *_: None)
    assert picture.device.type == "meta"


def test_a_damaged_picture_is_sampled_again(nano_model: Any, vae: Any, output_folder: Path, sampled: list[int]) -> None:
    _, before = compare(nano_model, vae)
    [file] = output_folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    _, after = compare(nano_model, vae)
    assert torch.equal(before, after)
    assert sampled == [5, 5]


def changes(nano: Path, model: Any, vae: Any) -> dict[str, dict[str, Any]]:
    """Inputs that give another picture."""
    lora, (x, text, references) = build(lora_file("transformer.{}.lora_{}.weight")), random_inputs()
    rewritten, other_vae = load_model(nano), load_vae(nano)
    config = read_vae_config(nano / "vae")
    statistics = replace(config, latents_std=tuple(2 * std for std in config.latents_std))
    with torch.inference_mode():
        rewritten.model.diffusion_model.transformer_blocks[1].attn.to_v.weight.data.mul_(-1)
        next(iter(other_vae.first_stage_model.parameters())).data.mul_(-1)
    return {
        "picture": {"positive": conditioning(text, [references[0] + 0.1, references[1]])},
        "order": {"positive": conditioning(text, references[::-1])},
        "prompt": {"positive": conditioning(text.flip(-1), references)},
        "negative": {"negative": conditioning(text.flip(-1), references)},
        "option of a conditioning": {"positive": [[text, {"reference_latents": references, "strength": 0.5}]]},
        "mask": {"latent": {"samples": torch.zeros_like(x), "noise_mask": torch.ones(1, 8, 8).tril()}},
        "latent": {"latent": {"samples": torch.ones_like(x)}, "denoise": 0.5},
        "size": {"latent": {"samples": torch.zeros(1, 16, 1, 8, 12)}},
        "LoRA": {"model": add_lora(model, lora, 1.0)[0]},
        "strength of a LoRA": {"model": add_lora(model, lora, 0.5)[0]},
        "weights": {"model": rewritten},
        "statistics of the latents": {"model": load_model(nano, latents=PictureLatents(statistics))},
        "VAE": {"vae": other_vae},
        "seed": {"seed": 6},
        "steps": {"steps": 3},
        "guidance": {"cfg": 2.0},
        "sampler": {"sampler": "euler"},
        "schedule": {"schedule": "few_step"},
        "denoise": {"denoise": 0.5},
        "cache": {"condition_cache": "approximate"},
        "cache_dtype": {"cache_dtype": "int8"},
    }


def test_a_changed_input_is_another_picture(nano_model: Any, vae: Any, nano: Path, sampled: list[int]) -> None:
    compare(nano_model, vae)
    for count, (name, change) in enumerate(changes(nano, nano_model, vae).items(), start=2):
        compare(**{"model": nano_model, "vae": vae, **change})
        assert len(sampled) == count, f"{name} is not in the key"
    compare(nano_model, vae)
    assert len(sampled) == count


def test_a_model_computed_in_another_way_is_another_model(
    nano_model: Any, nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time ranges follow the schedule, which the recipe sets; layers, attention and --fast change the numbers."""
    schedule = load_model(nano)
    schedule.model.model_sampling.set_parameters(shift=2.0)
    others = (schedule, load_model(nano, custom_operations=comfy.ops.manual_cast), nano_model)
    found = [model_key(model) for model in others]
    with monkeypatch.context() as patch:
        patch.setattr(keys, "optimized_attention_masked", attention_basic)
        found.append(model_key(nano_model))
    monkeypatch.setattr(args, "fast", {PerformanceFeature.Fp8MatrixMultiplication})
    found.append(model_key(nano_model))
    assert len(set(found)) == len(found)


def test_a_model_with_functions_of_other_nodes_is_not_stored(
    nano_model: Any, vae: Any, output_folder: Path, sampled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = nano_model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", lambda executor, *a, **k: executor(*a, **k))
    for _ in range(2):
        _, images = compare(model, vae)
    assert sampled == [5, 5]
    assert "Compare (UniPic): picture 1 of 1: seed 5" in caplog.text
    assert caplog.text.count("the pictures of this comparison are not stored, since the model has other") == 2
    assert not output_folder.exists()
    assert torch.equal(images, alone(nano_model, vae))
    patched = nano_model.clone()
    patched.set_model_sampler_cfg_function(lambda args: args["cond"])
    replaced = nano_model.clone()
    replaced.add_object_patch("diffusion_model.norm_out", torch.nn.Identity())
    for other in (model, patched, replaced):
        with pytest.raises(NoKey):
            model_key(other)
    assert model_key(nano_model.clone()) == model_key(nano_model) != model_key(with_kv_cache(nano_model, "off"))


def test_types_and_structure_enter_a_digest() -> None:
    values = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        [[1]],
        {"1": 1},
        {1: 1},
        torch.ones(1),
        torch.ones(1, 1),
        torch.ones(1).int(),
    ]
    assert len({Digest().add(value).hexdigest() for value in values}) == len(values)
    assert Digest().add({"a": 1, "b": 2}).hexdigest() == Digest().add({"b": 2, "a": 1}).hexdigest()


def test_the_oldest_pictures_are_removed(tmp_path: Path) -> None:
    picture = torch.rand(1, 8, 8, 3)
    size = 8 * 8 * 3 * 4 + 200
    store = CellStore(tmp_path / "cells", most_bytes=2 * size)
    store.save("a", picture)
    store.save("b", picture)
    assert store.load("a") is not None, "and is now the newest"
    store.save("c", picture)
    assert {f.stem for f in store.folder.iterdir()} == {"a", "c"}
    assert store.load("b") is None
    assert torch.equal(store.load("c"), picture)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x_axis": "seed", "x_values": ""}, "x_values must list values of seed, such as 1, 2, 3, got nothing"),
        ({"x_axis": "seed", "x_values": "1, two"}, "x_values must be whole numbers for seed, .* got 'two'"),
        ({"y_axis": "steps", "y_values": "4, 0"}, "y_values must be above 0 for steps, got 0"),
        ({"y_axis": "steps", "y_values": "2.5"}, "y_values must be whole numbers for steps, .* got '2.5'"),
        ({"x_axis": "guidance", "x_values": "nan"}, "x_values must be above 0 for guidance, got nan"),
        ({"x_axis": "lora_strength", "x_values": "inf", "lora": LORA}, "x_values must be finite, got inf"),
        ({"x_axis": "seed", "x_values": "-1"}, "x_values must be seeds from 0"),
        ({"x_axis": "size", "x_values": "1"}, "x_axis must be one of none, seed, .* got 'size'"),
        (
            {"x_axis": "seed", "x_values": "1", "y_axis": "seed", "y_values": "2"},
            "x_axis and y_axis must be different settings, got seed twice",
        ),
        (
            {"x_axis": "seed", "x_values": ",".join("123456789"), "y_axis": "steps", "y_values": ",".join("12345678")},
            "a grid may have at most 64 pictures, got 9 x 8 = 72; give fewer values",
        ),
        ({"x_axis": "lora_strength", "x_values": "1"}, "the axis lora_strength needs a LoRA"),
        ({"x_axis": "seed", "x_values": "1", "lora": LORA}, "no axis varies its strength"),
        ({"x_axis": "reference_budget", "x_values": "64"}, "must come straight from one Multi-Image Compose"),
        ({"latent": {"samples": torch.zeros(2, 16, 1, 8, 8)}}, "expects a latent of one picture, got 2"),
        ({"x_axis": "steps", "x_values": "100000"}, "the number of steps must be"),
    ],
)
def test_messages(inputs: dict[str, Any], message: str, nano_model: Any, vae: Any) -> None:
    with pytest.raises(UniPicError, match=message):
        compare(nano_model, vae, **inputs)
