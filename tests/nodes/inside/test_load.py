"""LoadUniPic: what it finds, what it gives, and what it says about what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file
from unipic_pack.nodes import load
from unipic_pack.nodes.host import model_paths as sources
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import attachment_of
from unipic_pack.nodes.load import LoadUniPic
from unipic_pack.nodes.lora import lora_path
from unipic_pack.unipic_core.errors import CheckpointError, UniPicError
from unipic_pack.unipic_core.weights.recipe import RELEASED_FEW_STEP

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty models folder of ComfyUI's, for each test."""
    kinds = ("diffusion_models", "text_encoders", "vae", "diffusers", "unipic", "embeddings")
    table = dict(folder_paths.folder_names_and_paths)
    for kind in kinds:
        extensions = table.get(kind, ([], set()))[1]
        table[kind] = ([str(tmp_path / kind)], extensions)
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    with torch.inference_mode():
        yield tmp_path


def run(model: str = sources.DEFAULT_MODEL, encoder: str = "auto", vae: str = "auto", dtype: str = "as stored") -> Any:
    return LoadUniPic.execute(model, encoder, vae, dtype).result


def options() -> dict[str, list[str]]:
    return {i.id: i.options for i in LoadUniPic.define_schema().inputs}


def test_bundled_nano_needs_nothing() -> None:
    assert options()["model"] == [sources.DEFAULT_MODEL]
    assert options()["text_encoder"] == options()["vae"] == ["auto", sources.DEFAULT_MODEL]
    model, clip, vae = run()
    assert attachment_of(model).recipe.steps
    assert attachment_of(clip.patcher) == attachment_of(model)
    latents = model.model.latent_format
    assert vae.latent_channels == latents.latent_channels == 16
    tokens = clip.tokenize("a red ball")
    assert clip.encode_from_tokens_scheduled(tokens)[0][0].shape[-1] == 128


def test_preview_colours_come_from_the_models_own_vae(golden: Path, models_folder: Path) -> None:
    """Each channel alone has the colour that its factor says, as the VAE is nearly linear in a small step."""
    shutil.copytree(golden / "tiny", models_folder / "unipic" / "tiny")
    model, _, vae = run("unipic/tiny")
    latents = model.model.latent_format
    factors, bias = torch.tensor(latents.latent_rgb_factors), torch.tensor(latents.latent_rgb_factors_bias)
    assert factors.shape == (4, 3)
    z = torch.zeros(1, 4, 1, 4, 4)
    colour = vae.decode(latents.process_out(z)).reshape(-1, 3).mean(0) * 2 - 1
    torch.testing.assert_close(colour, bias, rtol=0, atol=1e-3)
    assert factors.abs().max() > 1e-4


def test_names_of_what_is_there(golden: Path, models_folder: Path) -> None:
    tiny = golden / "tiny"
    (models_folder / "unipic" / "Skywork" / "Unipic3-DMD" / "ema_transformer").mkdir(parents=True)
    shutil.copytree(tiny / "transformer", models_folder / "diffusers" / "Edit" / "transformer")
    other = models_folder / "diffusers" / "Flux" / "transformer"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (models_folder / "diffusers" / "empty").mkdir()
    (models_folder / "diffusion_models" / "sub").mkdir()
    (models_folder / "diffusion_models" / "sub" / "a.safetensors").touch()
    (models_folder / "diffusion_models" / "notes.txt").touch()
    names = options()["model"]
    file = str(Path("sub") / "a.safetensors")
    assert names == [sources.DEFAULT_MODEL, "unipic/Skywork/Unipic3-DMD", "diffusers/Edit", file]
    assert sources.find_model("diffusers/Edit") == models_folder / "diffusers" / "Edit"
    assert sources.find_model(file) == models_folder / "diffusion_models" / file


@pytest.mark.parametrize(
    "name", ["../outside", "unipic/../../outside", "/etc/passwd", "unipic/", "", "..\\outside", "nan.safetensors"]
)
def test_names_never_lead_out(name: str, models_folder: Path) -> None:
    (models_folder.parent / "outside" / "transformer").mkdir(parents=True, exist_ok=True)
    with pytest.raises(
        UniPicError, match=r"put a released folder .* models/unipic/.*41 GB in bf16, 20 GB in fp8.*models"
    ):
        run(name)
    for kind in (sources.TEXT_ENCODER, sources.VAE):
        with pytest.raises(UniPicError, match=f"there is no {kind.label} .* in models/{kind.folder}/"):
            sources.find_part(kind, name, models_folder)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UniPicError, match=r"no model 'unipic-nano'; choose one of unipic-nano \(bundled\)"):
        run("unipic-nano")


def transformer_only(golden: Path, models_folder: Path) -> str:
    shutil.copytree(golden / "tiny" / "transformer", models_folder / "unipic" / "Unipic3-DMD" / "ema_transformer")
    return "unipic/Unipic3-DMD"


def test_missing_parts_are_named_with_place_and_size(golden: Path, models_folder: Path) -> None:
    name = transformer_only(golden, models_folder)
    with pytest.raises(UniPicError) as error:
        run(name)
    for part in ("Unipic3-DMD comes without a text encoder", "16.6 GB", "9.4 GB", "into models/text_encoders/"):
        assert part in str(error.value)
    (models_folder / "text_encoders" / "qwen_2.5_vl_7b_fp8_scaled.safetensors").touch()
    with pytest.raises(
        UniPicError, match=r"comes without a VAE.*qwen_image_vae.safetensors \(254 MB\).*into models/vae/"
    ):
        run(name)


def test_auto_takes_the_one_obvious_file(golden: Path, models_folder: Path) -> None:
    model = models_folder / "unipic" / "x"
    folder = models_folder / "text_encoders"
    for name in ("t5xxl.safetensors", "qwen_2.5_vl_7b.safetensors"):
        (folder / name).touch()
    assert sources.find_part(sources.TEXT_ENCODER, "auto", model) == folder / "qwen_2.5_vl_7b.safetensors"
    assert sources.find_part(sources.TEXT_ENCODER, "t5xxl.safetensors", model) == folder / "t5xxl.safetensors"
    (folder / "qwen_2.5_vl_7b_fp8_scaled.safetensors").touch()
    folder.touch()
    folder_paths.filename_list_cache.clear()
    with pytest.raises(
        UniPicError,
        match="more than one text encoder in .*: qwen_2.5_vl_7b.* choose one in",
    ):
        sources.find_part(sources.TEXT_ENCODER, "auto", model)
    assert sources.find_part(sources.VAE, "auto", golden / "tiny") == golden / "tiny"


def test_recipe_of_a_released_folder(golden: Path, models_folder: Path) -> None:
    """The DMD repository is known by its name; its parts come from elsewhere."""
    from unipic_pack.nodes.host.model.latent_format import read_latent_format
    from unipic_pack.nodes.host.model.loading import load_model

    name = transformer_only(golden, models_folder)
    model = load_model(sources.find_model(name), latents=read_latent_format(golden / "tiny"))
    assert attachment_of(model).recipe == RELEASED_FEW_STEP


def test_weights_without_a_recipe_are_named(
    golden: Path, models_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither they nor their name say how to sample them, so the log says what is done with them."""
    run()
    assert "no recipe" not in caplog.text
    for name in ("mine", "Unipic3-DMD"):
        shutil.copytree(golden / "tiny", models_folder / "unipic" / name)
        run(f"unipic/{name}")
    text = "mine has no recipe, so it runs with 50 steps, euler, guidance 4; if it is"
    [record] = [r for r in caplog.records if "no recipe" in r.getMessage()]
    assert (record.levelname, text in record.getMessage()) == ("WARNING", True)
    shutil.copy(sources.find_model(sources.DEFAULT_MODEL) / "recipe.json", models_folder / "unipic" / "mine")
    run("unipic/mine")
    assert len([r for r in caplog.records if "no recipe" in r.getMessage()]) == 1


def test_files_of_another_kind(models_folder: Path, nano: Path) -> None:
    encoders, vaes = models_folder / "text_encoders", models_folder / "vae"
    save_file({"decoder.conv1.weight": torch.zeros(2, 2)}, encoders / "vae.safetensors")
    save_file({"model.embed_tokens.weight": torch.zeros(4, 3584)}, encoders / "large.safetensors")
    save_file({"double_blocks.0.x": torch.zeros(2, 2)}, vaes / "flux.safetensors")
    save_file({"decoder.conv1.weight": torch.zeros(2, 2)}, vaes / "odd.safetensors")
    with pytest.raises(UniPicError, match=r"got vae.safetensors, which looks like a VAE; use qwen_2.5"):
        run(encoder="vae.safetensors")
    with pytest.raises(UniPicError, match="expects text of width 128, got 3584 from large.safetensors"):
        run(encoder="large.safetensors")
    with pytest.raises(UniPicError, match="expected a VAE, got flux.safetensors, which looks like a FLUX transformer"):
        run(vae="flux.safetensors")
    with pytest.raises(UniPicError, match=r"ComfyUI cannot use odd.safetensors as VAE .*; use qwen_image_vae"):
        run(vae="odd.safetensors")
    (vaes / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load.load_vae(vaes / "cut.safetensors")


def test_a_vae_of_other_channels(models_folder: Path, golden: Path) -> None:
    import unipic_pack.nodes.host.pictures.vae as own
    from unipic_pack.nodes.host.model.latent_format import PictureLatents

    with pytest.raises(UniPicError, match="latents of 16 channels, got 4 from the VAE tiny"):
        load.check_vae(own.load_vae(golden / "tiny"), PictureLatents(), golden / "tiny")


def test_weight_dtype_reaches_the_network(models_folder: Path) -> None:
    model, *_ = run(dtype="fp8")
    assert model.model.diffusion_model.proj_out.weight.dtype == torch.float8_e4m3fn


def test_single_file_beside_comfyuis_own_vae(models_folder: Path, nano: Path) -> None:
    """A transformer file with a VAE file in ComfyUI's layout: Wan-style keys, small but of the released shape."""
    from comfy.ldm.wan.vae import WanVAE

    small = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    for p in small.parameters():
        torch.nn.init.normal_(p, std=0.02)
    save_file(small.state_dict(), models_folder / "vae" / "qwen_image_vae.safetensors")
    weights = load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors")
    config = (nano / "transformer" / "config.json").read_text()
    save_file(weights, models_folder / "diffusion_models" / "nano.safetensors", {"unipic_config": config})
    vae = load.load_vae(sources.find_part(sources.VAE, "auto", sources.find_model("nano.safetensors")))
    assert vae.decode(torch.zeros(1, 16, 1, 2, 2)).shape[-3:] == (16, 16, 3)
    load.check_vae(vae, load.read_latent_format(sources.find_model("nano.safetensors")), Path("x"))


def test_the_bundled_encoder_and_vae_serve_a_saved_network(models_folder: Path, nano: Path) -> None:
    """A file as Save Model writes it has neither; with the nano's parts it is the nano again."""
    lists = options()
    assert sources.DEFAULT_MODEL in lists["text_encoder"]
    assert sources.DEFAULT_MODEL in lists["vae"]
    weights = load_file(nano / "transformer" / "diffusion_pytorch_model.safetensors")
    config = (nano / "transformer" / "config.json").read_text()
    save_file(weights, models_folder / "diffusion_models" / "mine.safetensors", {"unipic_config": config})
    model, clip, vae = run("mine.safetensors", sources.DEFAULT_MODEL, sources.DEFAULT_MODEL)
    nano_model, nano_clip, nano_vae = run()
    got, want = model.model.latent_format, nano_model.model.latent_format
    assert torch.equal(got.latents_mean, want.latents_mean)
    assert got.latent_rgb_factors == want.latent_rgb_factors
    text = [c.encode_from_tokens_scheduled(c.tokenize("a red ball"))[0][0] for c in (clip, nano_clip)]
    assert torch.equal(*text)
    assert vae.config == nano_vae.config


@pytest.mark.parametrize(
    "changed",
    [
        *("transformer/diffusion_pytorch_model.safetensors", "recipe.json", "text_encoder/model.safetensors"),
        *("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer_config.json"),
    ],
)
def test_a_rewritten_part_is_noticed(changed: str, models_folder: Path, nano: Path) -> None:
    folder = shutil.copytree(nano, models_folder / "unipic" / "mine", copy_function=shutil.copy)

    def fingerprint() -> object:
        return LoadUniPic.fingerprint_inputs("unipic/mine", "auto", "auto", weight_dtype="as stored")

    before = fingerprint()
    assert fingerprint() == before
    (folder / changed).write_bytes((folder / changed).read_bytes())  # as large, under the same name
    assert fingerprint() != before


def test_a_rewritten_file_is_noticed(models_folder: Path) -> None:
    names = [("diffusion_models", "m"), ("text_encoders", "t"), ("vae", "v")]
    for folder, name in names:
        (models_folder / folder / f"{name}.safetensors").write_bytes(b"1")
    arguments = [f"{name}.safetensors" for _, name in names]
    seen = [LoadUniPic.fingerprint_inputs(*arguments)]
    for folder, name in names:
        (models_folder / folder / f"{name}.safetensors").write_bytes(b"2")
        seen.append(LoadUniPic.fingerprint_inputs(*arguments))
        assert seen[-1] not in seen[:-1]
    assert LoadUniPic.fingerprint_inputs("gone", "auto", "auto") == LoadUniPic.fingerprint_inputs(
        "gone", "auto", "auto"
    )
    assert LoadUniPic.fingerprint_inputs(None, "auto", "auto") is None


def test_a_folder_of_the_download_cache(models_folder: Path, golden: Path) -> None:
    """Repositories lie there as links from snapshots to blobs, under names of hashes."""
    repository = models_folder / "unipic" / "models--Skywork--Unipic3-DMD"
    snapshot = repository / "snapshots" / "0a1b2c"
    for file in (f for f in (golden / "tiny").rglob("*") if f.is_file()):
        link = snapshot / file.relative_to(golden / "tiny")
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{file.parent.name}-{file.name}.hash"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b2c")
    (repository / "snapshots" / "ffff").mkdir()
    name = "unipic/models--Skywork--Unipic3-DMD"
    assert name in options()["model"]
    assert sources.find_model(name) == snapshot
    model, clip, vae = run(name)
    assert attachment_of(model).recipe == RELEASED_FEW_STEP
    assert clip.tokenize("a")
    assert vae.latent_channels == 4
    before = LoadUniPic.fingerprint_inputs(name, "auto", "auto")
    blob = repository / "blobs" / "transformer-diffusion_pytorch_model.safetensors.hash"
    blob.write_bytes(blob.read_bytes())
    assert LoadUniPic.fingerprint_inputs(name, "auto", "auto") != before


def test_gguf_files_name_their_loader(models_folder: Path) -> None:
    (models_folder / "diffusion_models" / "sub").mkdir()
    (models_folder / "diffusion_models" / "sub" / "unipic3-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "sub/unipic3-Q4_K_M.gguf" in options()["model"]
    for name in ("sub/unipic3-Q4_K_M.gguf", "gone.gguf"):
        with pytest.raises(UniPicError, match=r"does not read GGUF, got .*; use Unet Loader \(GGUF\)"):
            run(name)


def test_schema() -> None:
    schema = LoadUniPic.define_schema()
    assert schema.node_id == "LoadUniPic"
    assert all(i.tooltip for i in schema.inputs)
    assert [o.io_type for o in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    json.dumps(LoadUniPic.INPUT_TYPES())
    assert LoadUniPic.validate_inputs("gone", "auto", "auto") is True


@pytest.mark.parametrize("given", [5, ["a"], None])
def test_a_number_in_the_place_of_a_file(given: object) -> None:
    """What a wire or the API lets through."""
    with pytest.raises(UniPicError, match="there is no model"):
        sources.find_model(given)
    with pytest.raises(UniPicError, match="there is no VAE"):
        sources.find_part(sources.VAE, given, sources.find_model(sources.DEFAULT_MODEL))
    with pytest.raises(UniPicError, match="weight_dtype must be one of"):
        load_model(sources.find_model(sources.DEFAULT_MODEL), given)
    with pytest.raises(UniPicError, match="lora must be the name of a file, got"):
        lora_path(given)
