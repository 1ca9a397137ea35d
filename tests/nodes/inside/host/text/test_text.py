"""The CLIP of a pipeline folder against the golden numbers, the pipeline, and ComfyUI's own encoder."""

import json
import re
import shutil
from pathlib import Path

import comfy.sd
import comfy.text_encoders.qwen_image as stock
import pytest
import torch
from comfy.text_encoders import llama
from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus
from comfyui import CASES
from compose_tools import image, run
from PIL import Image
from safetensors.torch import load_file, save_file
from unipic_pack.nodes.host.pictures.vae import load_vae
from unipic_pack.nodes.host.text import vision_cache as vision
from unipic_pack.nodes.host.text.encoder import (
    comfy_name,
    encode_prompt,
    enlarged_references,
    load_clip,
    read_encoder_weights,
)
from unipic_pack.nodes.host.text.encoder_config import EncoderConfig
from unipic_pack.nodes.host.text.encoder_model import Qwen25VL
from unipic_pack.nodes.host.text.tokenizer import KEY
from unipic_pack.unipic_core.conditioning.images import load_image, resize_references
from unipic_pack.unipic_core.conditioning.prompt import PREFIX, body_text
from unipic_pack.unipic_core.errors import CheckpointError, UniPicError
from unipic_pack.unipic_core.weights.convert import quantise_fp8

import nodes as comfy_nodes

COLOURS = ((200, 30, 30), (30, 160, 60), (40, 60, 200), (220, 200, 40), (120, 40, 140), (10, 10, 10))


@pytest.fixture(scope="module")
def tiny(golden):
    return load_clip(golden / "tiny")


@pytest.fixture(scope="module")
def small(nano):
    return load_clip(nano)


def gradient(index: int, width: int, height: int) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.composite(Image.new("RGB", (width, height), COLOURS[index]), Image.new("RGB", (width, height)), ramp)


def pictures(count: int, budget: int) -> list[Image.Image]:
    return resize_references([gradient(i, 60 + 40 * i, 90) for i in range(count)], budget)


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_golden_embeds(tiny, golden, name):
    folder = golden / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    images = [load_image(folder / f"image_{i + 1}.png") for i in range(len(case["reference_sizes"]))]
    references = resize_references(images, case["reference_budget"])
    for which in ("prompt", "negative_prompt"):
        [[embeds, extra]] = encode_prompt(tiny, case[which], references)
        assert distance(embeds, tensors[f"{which}_embeds"]) < 1e-4
        assert extra.get("attention_mask") is None


def test_golden_prefix(tiny, golden):
    case = json.loads((golden / "cases" / CASES[0] / "case.json").read_text())
    tokens = [pair[0] for pair in tiny.tokenize(case["text"])[KEY][0]]
    assert tiny.tokenizer.dropped(tokens) == case["dropped_prefix_tokens"]


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_embeds_of_the_pipeline(small, nano, pipeline, count):
    encoder = pipeline.TextEncoder.from_pretrained(nano, torch.float32)
    references = pictures(count, 160)
    for prompt in ("Put the hat on the panda, (gently:1.2) \\(really\\).", "", " ", "\nembedding:x {a|b} 熊猫"):
        want = encoder.encode([references], [prompt])
        [[embeds, extra]] = encode_prompt(small, prompt, references)
        assert distance(embeds, want.embeds) < 1e-4
        assert extra.get("attention_mask") is None
        assert want.mask is None


@torch.inference_mode()
def test_stock_nodes_take_our_clip(small):
    image = torch.rand(1, 48, 80, 3)
    encode = TextEncodeQwenImageEditPlus.execute(small, "Blend them.", None, image, None, image[:, :40])
    [[embeds, extra]] = encode.args[0]
    assert embeds.shape[-1] == 128
    assert torch.isfinite(embeds).all()
    assert "reference_latents" not in extra
    [[text, _]] = comfy_nodes.CLIPTextEncode().encode(small, "a red hat")[0]
    [[same, _]] = encode_prompt(small, "a red hat", [])
    assert torch.equal(text, same)


@torch.inference_mode()
def test_stock_template_and_labels(small):
    """The stock node's prompt through our tokenizer: its labels stay text, its template's prefix is dropped."""
    image = torch.rand(1, 56, 56, 3)
    text = "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Go."
    tokens = small.tokenize(text, images=[image], llama_template=PREFIX + "{}<|im_end|>\n<|im_start|>assistant\n")
    ids = [pair[0] for pair in tokens[KEY][0]]
    assert sum(isinstance(i, dict) for i in ids) == 1
    length = len(ids) - small.tokenizer.dropped(ids) + 4 - 1  # the image is 2x2 tokens
    assert small.encode_from_tokens(tokens).shape[1] == length


def test_tokens_are_those_of_the_prompt_module(small):
    tokens = [pair[0] for pair in small.tokenize("A hat", images=[torch.zeros(1, 28, 28, 3)] * 2)[KEY][0]]
    ids = [i if isinstance(i, int) else small.tokenizer.image_token for i in tokens]
    dropped = small.tokenizer.dropped(tokens)
    assert small.tokenizer.decode(ids[:dropped], skip_special_tokens=False) == PREFIX
    assert small.tokenizer.decode(ids[dropped:], skip_special_tokens=False) == body_text("A hat", 2)


def test_marks_in_the_prompt_stay_text(small, nano, pipeline):
    """As in the pipeline, token by token."""
    prompt = "a <|im_end|> b <|vision_start|><|image_pad|> c"
    text = PREFIX + body_text(prompt, 1)
    tokens = [pair[0] for pair in small.tokenize(text, images=[torch.zeros(1, 28, 28, 3)], prompt=prompt)[KEY][0]]
    ids = [i if isinstance(i, int) else small.tokenizer.image_token for i in tokens]
    assert ids == pipeline.TextEncoder.from_pretrained(nano, torch.float32).prompt_ids(prompt, [1])
    assert ids.count(small.tokenizer.image_token) == 1
    assert small.tokenizer.decode(ids, skip_special_tokens=False) == text
    [[embeds, _]] = encode_prompt(small, prompt, pictures(1, 64))
    assert embeds.isfinite().all()


def test_marks_are_refused_by_a_clip_that_reads_them(small):
    class Other:
        tokenizer = None

    with pytest.raises(UniPicError, match=r"contains <tool_call>, a special token for this text encoder; remove"):
        encode_prompt(Other(), "a <tool_call> b", [])


def test_a_lone_surrogate_through_a_stock_node(small):
    """Half an emoji; the tokenizer's own error is a TypeError."""
    with pytest.raises(UniPicError, match=r"not valid Unicode: character 7 is U\+D83D"):
        comfy_nodes.CLIPTextEncode().encode(small, "rocket\ud83d")


def test_too_long_a_prompt(small):
    with pytest.raises(UniPicError, match="too long"):
        encode_prompt(small, "word " * 40000, [])


def test_a_prompt_longer_than_any_in_training(small, caplog):
    small.tokenize("word " * 300)
    assert not caplog.records
    small.tokenize("word " * 400)
    assert re.search(r"UniPic: the prompt has 1\d{3} tokens; the model was trained up to 1024", caplog.text)


# --- folders -------------------------------------------------------------------------------------------------------


def copy_of(folder, target):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, target / part)
    return target


@torch.inference_mode()
def test_newer_names_and_shards(nano, small, tmp_path):
    folder = copy_of(nano, tmp_path)
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    newer = {
        k.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1)
        if k.startswith("model.")
        else "model." + k: v
        for k, v in weights.items()
    }
    (folder / "text_encoder" / "model.safetensors").unlink()
    halves, index = [dict(list(newer.items())[i::2]) for i in range(2)], {}
    for i, half in enumerate(halves):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(half, folder / "text_encoder" / name)
        index |= dict.fromkeys(half, name)
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    references = pictures(1, 96)
    [[a, _]], [[b, _]] = (encode_prompt(clip, "Hm", references) for clip in (load_clip(folder), small))
    assert torch.equal(a, b)


def test_tokenizer_in_the_processor_folder(nano, small, tmp_path):
    folder = copy_of(nano, tmp_path)
    shutil.copytree(nano / "processor", folder / "processor")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert load_clip(folder).tokenize("A hat (red)")[KEY] == small.tokenize("A hat (red)")[KEY]
    (folder / "processor" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be loaded"):
        load_clip(folder)


def test_names():
    assert comfy_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert comfy_name("model.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    for same in ("model.norm.weight", "visual.blocks.0.norm1.weight"):
        assert comfy_name(same) == same


def test_damaged_folders(nano, tmp_path):
    with pytest.raises(CheckpointError, match="no text_encoder/ folder"):
        load_clip(tmp_path)
    folder = copy_of(nano, tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "visual.blocks.1.norm2.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*visual\.blocks\.1\.norm2"):
        load_clip(folder)
    save_file({**weights, "model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_clip(folder)
    file.write_bytes(b"junk")
    with pytest.raises(CheckpointError):
        load_clip(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("1022", "1021"))
    with pytest.raises(CheckpointError, match="same folder"):
        load_clip(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_clip(folder)


def test_a_second_copy_of_the_weights(tiny):
    """ComfyUI asks for one to run on several devices, or without streaming."""
    make, args = tiny.patcher.cached_patcher_init
    copy, norm = make(*args, disable_dynamic=True), "qwen25_7b.transformer.model.norm.weight"
    assert copy.model is not tiny.cond_stage_model
    assert torch.equal(copy.model.state_dict()[norm], tiny.cond_stage_model.state_dict()[norm])


@torch.inference_mode()
def test_fp8_layers_stay_fp8(nano, small, tmp_path):
    """Layers stored as scaled fp8 the way ComfyUI does; about three decimal digits are left of each weight."""
    folder = copy_of(nano, tmp_path)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.startswith("model.layers.") and ".mlp." in name]:
        layer = name.removesuffix(".weight")
        weights[name], weights[f"{layer}.weight_scale"] = quantise_fp8(weights[name])
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(weights, file)
    clip, references = load_clip(folder), pictures(1, 96)
    stored = clip.cond_stage_model.qwen25_7b.transformer.model.layers[0].mlp.up_proj.weight
    assert type(stored).__name__ == "QuantizedTensor"
    [[a, _]], [[b, _]] = (encode_prompt(c, "A hat", references) for c in (clip, small))
    assert 0 < distance(a, b) < 0.1 * b.abs().max()


def test_released_sizes_are_comfyuis_own():
    config = EncoderConfig.from_dict({"model_type": "qwen2_5_vl", "transformers_version": "4.53.1"})
    ours = Qwen25VL(config, {}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    theirs = llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    mine, stock_config = ours.model.config, theirs.model.config
    assert mine == stock_config
    for name in ("head_dim", "rope_dims"):
        assert getattr(mine, name) == getattr(stock_config, name)
    for name in ("fullatt_block_indexes", "window_size", "patch_size", "spatial_merge_size"):
        assert getattr(ours.visual, name) == getattr(theirs.visual, name)
    assert not ours.sequential


# --- ComfyUI's own encoder -----------------------------------------------------------------------------------------

REAL = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    },
    "transformers_version": "4.53.1",
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with the released vocabulary and random weights, and the same weights through ComfyUI's own loader."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(Path(stock.__file__).parent / "qwen25_tokenizer", folder / "tokenizer")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(REAL))
    config = EncoderConfig.from_dict(REAL)
    network = Qwen25VL(config, {}, torch.float32, "cpu", comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    weights = {k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors")

    class Small(stock.Qwen25_7BVLIModel):
        def __init__(self, **kwargs):
            inner = stock.comfy.text_encoders.llama.Qwen25_7BVLI
            try:
                stock.comfy.text_encoders.llama.Qwen25_7BVLI = lambda *args: StockSized(config, *args)
                super().__init__(**kwargs)
            finally:
                stock.comfy.text_encoders.llama.Qwen25_7BVLI = inner

    class StockSized(Qwen25VL):  # small sizes, with all of ComfyUI's own behaviour
        preprocess_embed = stock.comfy.text_encoders.llama.Qwen25_7BVLI.preprocess_embed
        forward = stock.comfy.text_encoders.llama.Qwen25_7BVLI.forward

    clip = comfy.sd.load_clip(
        [str(folder / "text_encoder" / "model.safetensors")],
        clip_type=comfy.sd.CLIPType.QWEN_IMAGE,
        model_options={"qwen25_7b_class": Small},
    )
    return load_clip(folder), clip


@torch.inference_mode()
@pytest.mark.parametrize("count", [0, 2, 6])
def test_stock_clip_agrees_with_ours(real, count):
    ours, theirs = real
    references = pictures(count, 320)
    for prompt in ("Put (the hat:1.3) on \\(it\\).", " ", ""):
        [[a, _]], [[b, _]] = (encode_prompt(clip, prompt, references) for clip in real)
        assert distance(a, b) < 1e-4
    tokens = [pair[0] for pair in ours.tokenize("x")[KEY][0]]
    assert ours.tokenizer.dropped(tokens) == 64  # as with the released tokenizer
    assert type(theirs.tokenizer) is not type(ours.tokenizer)


@torch.inference_mode()
def test_stock_clip_sees_a_picture_once(real):
    theirs, references = real[1], pictures(2, 320)
    vision.clear_cache()
    passes, tower = [], theirs.cond_stage_model.qwen25_7b.transformer.visual
    hook = tower.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    try:
        [[shared, _]] = [encode_prompt(theirs, text, references)[0] for text in ("A hat", " ")][1:]
        assert len(passes) == 2
        vision.clear_cache()
        assert torch.equal(encode_prompt(theirs, " ", references)[0][0], shared)
        assert len(passes) == 4
    finally:
        hook.remove()
    assert "forward" not in vars(tower)


def test_stock_clip_enlarges_small_references(real):
    ours, theirs = real
    [line] = enlarged_references(theirs, [(320, 320), (32, 32), (32, 32)])
    assert "enlarges a reference of 28x28 pixels" in line
    assert enlarged_references(theirs, [(64, 64)]) == enlarged_references(ours, [(32, 32)]) == []


@pytest.mark.usefixtures("fresh")
def test_multi_image_compose_tells_of_enlarging(real, golden, caplog):
    run((real[1], load_vae(golden / "tiny")), image(0, 32, 32), reference_budget=32, width=32, height=32)
    [line] = [r.getMessage() for r in caplog.records if "enlarges a reference of 28x28 pixels" in r.getMessage()]
    assert line.startswith("Multi-Image Compose (UniPic): ")


def test_another_kind_of_clip(small):
    class Other:
        tokenizer = None

        def tokenize(self, text, **_):
            return {"l": [], "g": []}

    with pytest.raises(UniPicError, match=r"must be a Qwen2\.5-VL, got one with tokens for g, l"):
        encode_prompt(Other(), "x", [])


def test_read_weights_leaves_the_head_out(golden):
    assert not any(name.startswith("lm_head") for name in read_encoder_weights(golden / "tiny" / "text_encoder"))
