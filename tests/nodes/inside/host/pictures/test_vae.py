"""The VAE of a folder against the golden numbers and the pipeline, that of a file against ComfyUI's; nodes on both."""

import json
import shutil

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.ldm.wan.vae import WanVAE
from comfyui import CASES
from safetensors.torch import load_file, save_file
from unipic_pack.nodes import load
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.host.pictures.vae import UniPicVAE, load_vae
from unipic_pack.unipic_core.conditioning.images import load_image, resize_references
from unipic_pack.unipic_core.errors import CheckpointError
from unipic_pack.unipic_core.model.vae import ImageVAE, VAEConfig
from unipic_pack.unipic_core.weights.vae import name_in_file, read_vae_config, video_shapes

import nodes as comfy_nodes


@pytest.fixture(scope="module")
def tiny(golden):
    return load_vae(golden / "tiny")


@pytest.fixture(scope="module")
def small(nano):
    return load_vae(nano)


def normalised(vae, latent):
    mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).reshape(2, 1, -1, 1, 1, 1)
    return (latent - mean) / std


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


def smooth(width, height, batch=1):
    """[B, H, W, 3] pictures of soft colours, each another."""
    noise = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").movedim(1, -1)


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_golden_latents(tiny, golden, name):
    folder = golden / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    images = [load_image(folder / f"image_{i + 1}.png") for i in range(len(case["reference_sizes"]))]
    for i, reference in enumerate(resize_references(images, case["reference_budget"])):
        latent = tiny.encode(to_image(reference))
        assert distance(normalised(tiny, latent), tensors[f"reference_latent_{i + 1}"]) < 1e-4


@torch.inference_mode()
def test_numbers_of_the_pipeline(small, nano, pipeline):
    vae, image = pipeline.VAE.from_pretrained(nano / "vae", torch.float32), smooth(96, 64)
    pixels = (image[0] * 255).round().to(torch.uint8)
    latent = small.encode(pixels[None] / 255)
    want = vae.encode((pixels.movedim(-1, 0) / 127.5 - 1)[None])
    assert distance(normalised(small, latent), want) < 1e-4
    assert distance(small.decode(latent)[:, 0], (vae.decode(want).movedim(1, -1) + 1) / 2) < 1e-4


@torch.inference_mode()
def test_a_batch_is_as_many_pictures(small):
    images = smooth(64, 32, batch=3)
    together = small.encode(images)
    assert together.shape == (3, 16, 1, 4, 8)
    assert distance(together, torch.cat([small.encode(image[None]) for image in images])) < 1e-5
    decoded = small.decode(together)
    assert decoded.shape == (3, 1, 32, 64, 3)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    frames = together.transpose(0, 2)  # one latent of three frames, as layered latents are
    assert distance(small.decode(frames)[0], decoded[:, 0]) < 1e-5
    assert small.decode(together[:, :, 0]).shape == (3, 32, 64, 3)


@torch.inference_mode()
def test_stock_nodes(small):
    image = smooth(96, 64, batch=2)
    [latent] = comfy_nodes.VAEEncode().encode(small, image)
    [back] = comfy_nodes.VAEDecode().decode(small, latent)
    assert latent["samples"].shape == (2, 16, 1, 8, 12)
    assert back.shape == image.shape
    rgba = torch.cat([image, torch.ones_like(image[..., :1])], dim=-1)
    assert distance(small.encode(rgba), latent["samples"]) < 1e-4
    assert small.encode(image[:, :61, :93]).shape[-2:] == (7, 11)


@torch.inference_mode()
def test_tiled_nodes(small):
    """Tiles see less of the picture, so equal in shape and close, and exact where one tile covers everything."""
    image = smooth(256, 192)
    [latent] = comfy_nodes.VAEEncode().encode(small, image)
    [tiled] = comfy_nodes.VAEEncodeTiled().encode(small, image, tile_size=128, overlap=64)
    assert tiled["samples"].shape == latent["samples"].shape
    assert (tiled["samples"] - latent["samples"]).abs().mean() < 0.2 * latent["samples"].std()
    [whole] = comfy_nodes.VAEDecode().decode(small, latent)
    [parts] = comfy_nodes.VAEDecodeTiled().decode(small, latent, tile_size=128, overlap=64)
    assert parts.shape == whole.shape
    assert (parts - whole).abs().mean() < 0.05
    [one_tile] = comfy_nodes.VAEDecodeTiled().decode(small, latent, tile_size=512)
    assert distance(one_tile, whole) < 1e-5
    [one_tile] = comfy_nodes.VAEEncodeTiled().encode(small, image, tile_size=512, overlap=64)
    assert distance(one_tile["samples"], latent["samples"]) < 1e-5


def test_what_other_nodes_ask(tiny, small):
    assert (tiny.latent_channels, small.latent_channels) == (4, 16)
    assert small.spacial_compression_encode() == small.spacial_compression_decode() == 8
    shapes = [(1, 3, 1, 256, 256), (1, 16, 1, 32, 32)]
    encode, decode = (
        small.memory_used_encode(shapes[0], torch.float32),
        small.memory_used_decode(shapes[1], torch.float32),
    )
    assert 0 < encode < decode < 1e9
    assert small.memory_used_encode((1, 3, 1, 512, 256), torch.float32) == 2 * encode


def test_loading_says_nothing_of_missing_weights(nano, caplog):
    load_vae(nano)
    assert "VAE" not in caplog.text


def test_a_second_copy_of_the_weights(tiny):
    """ComfyUI asks for one to run on several devices."""
    make, args = tiny.patcher.cached_patcher_init
    copy = make(*args, disable_dynamic=True)
    assert copy.model is not tiny.first_stage_model
    assert torch.equal(copy.model.quant_conv.weight, tiny.first_stage_model.quant_conv.weight)


def test_config(golden):
    config = read_vae_config(golden / "tiny" / "vae")
    assert config.z_dim == 4
    assert config.latents_std == (0.9, 1.1, 1.3, 0.7)


def test_damaged_folders(nano, tmp_path):
    with pytest.raises(CheckpointError, match=r"no vae/config\.json"):
        load_vae(tmp_path)
    shutil.copytree(nano / "vae", tmp_path / "vae")
    config, file = tmp_path / "vae" / "config.json", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    good, weights = json.loads(config.read_text()), load_file(file)
    save_file({k: v for k, v in weights.items() if k != "quant_conv.bias"}, file)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json.*quant_conv\.bias"):
        load_vae(tmp_path)
    for wrong in ({"latents_mean": [0.0]}, {"latents_std": [0.0] * 16}):
        config.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(CheckpointError, match="should each be 16 numbers"):
            load_vae(tmp_path)
    config.write_text(json.dumps({**good, "_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="got one of a AutoencoderKL"):
        load_vae(tmp_path)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_vae(tmp_path)


# --- one file, as ComfyUI has it -----------------------------------------------------------------------------------

SIZES = {"z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


def wan_file(folder, **sizes):
    """ComfyUI's network with random weights that keep what goes through it at a size near one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, p in WanVAE(**{**SIZES, "dim": 8, **sizes}).state_dict().items():
        scale = (p[0].numel() / (3 if p.ndim == 5 and p.shape[2] == 3 else 1)) ** -0.5 if p.ndim > 3 else 0.1
        noise = torch.randn(p.shape, generator=generator)
        tensors[name] = 1 + 0.2 * noise if name.endswith("gamma") else scale * noise
    save_file(tensors, folder / "qwen_image_vae.safetensors")
    return folder / "qwen_image_vae.safetensors"


def test_names_of_the_released_file():
    config = VAEConfig()
    with torch.device("meta"):
        ours, theirs = ImageVAE(config), WanVAE(dim=config.base_dim, **SIZES)
    expected = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    assert {name_in_file(name, config): shape for name, shape in video_shapes(ours).items()} == expected


@torch.inference_mode()
@pytest.mark.parametrize("dim", [8, 12])
def test_a_file_gives_comfyuis_numbers(dim, tmp_path):
    file = wan_file(tmp_path, dim=dim)
    ours, stock = load.load_vae(file), comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    assert isinstance(ours, UniPicVAE)
    assert isinstance(stock.first_stage_model, WanVAE)
    for image in (smooth(64, 48), smooth(40, 96)):
        latent = stock.encode(image)
        assert latent.std() > 0.1
        assert distance(ours.encode(image), latent) < 1e-5
        decoded = stock.decode(latent)
        assert decoded.std() > 0.1
        assert distance(ours.decode(latent), decoded) < 1e-5
    assert ours.memory_used_decode((1, 16, 1, 32, 32), torch.bfloat16) < stock.memory_used_decode(
        (1, 16, 1, 32, 32), torch.bfloat16
    )


@torch.inference_mode()
def test_a_file_in_tiles_and_batches(tmp_path):
    vae = load.load_vae(wan_file(tmp_path))
    images = smooth(96, 64, batch=2)
    together = vae.encode(images)
    assert distance(together, torch.cat([vae.encode(image[None]) for image in images])) < 1e-5
    [one_tile] = comfy_nodes.VAEDecodeTiled().decode(vae, {"samples": together}, tile_size=512)
    [whole] = comfy_nodes.VAEDecode().decode(vae, {"samples": together})
    assert distance(one_tile, whole) < 1e-5
    make, args = vae.patcher.cached_patcher_init
    copy = make(*args, disable_dynamic=True).model
    assert torch.equal(copy.decoder.conv_in.weight, vae.first_stage_model.decoder.conv_in.weight)


def test_files_of_another_vae_are_left_to_comfyui(tmp_path):
    vae = load.load_vae(wan_file(tmp_path, image_channels=4, conv_out_channels=4))
    assert isinstance(vae.first_stage_model, WanVAE)


# --- saving --------------------------------------------------------------------------------------------------------


def saved(vae, folder, monkeypatch):
    """The file that Save VAE writes."""
    from comfy_extras.nodes_model_merging import VAESave

    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(folder))
    VAESave().save(vae, "ComfyUI_vae")
    [file] = folder.glob("*.safetensors")
    return file


@torch.inference_mode()
def test_a_saved_file_gives_the_same_numbers_in_both_loaders(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    first = load.load_vae(wan_file(tmp_path / "first"))
    file = saved(first, tmp_path, monkeypatch)
    again, stock = load.load_vae(file), comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    assert isinstance(stock.first_stage_model, WanVAE)
    image = smooth(64, 48)
    latent = first.encode(image)
    assert distance(again.encode(image), latent) == distance(again.decode(latent), first.decode(latent)) == 0
    assert distance(stock.encode(image), latent) < 1e-5
    assert distance(stock.decode(latent), first.decode(latent)) < 1e-5


@torch.inference_mode()
def test_the_nanos_saved_file_loads_again(small, tmp_path, monkeypatch):
    """It has one residual block a level, which the file shows; ComfyUI's own loader knows two alone."""
    again, image = load.load_vae(saved(small, tmp_path, monkeypatch)), smooth(64, 48)
    assert again.config == small.config
    latent = small.encode(image)
    assert distance(again.encode(image), latent) == distance(again.decode(latent), small.decode(latent)) == 0


def test_a_vae_that_a_file_cannot_describe(tiny, tmp_path, monkeypatch):
    with pytest.raises(
        CheckpointError, match="statistics differ from the release.s and one file cannot store them; use the model"
    ):
        saved(tiny, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())
