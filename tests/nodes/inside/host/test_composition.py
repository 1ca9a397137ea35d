"""What MultiImageCompose keeps: nothing is encoded twice, nothing stale is used."""

import comfy.sd
import pytest
import torch
from comfy.ldm.wan.vae import WanVAE
from compose_tools import distance, image, run
from PIL import Image
from unipic_pack.nodes.host import composition
from unipic_pack.nodes.host.pictures.images import to_pictures
from unipic_pack.nodes.host.text.encoder import encode_prompt
from unipic_pack.unipic_core.conditioning.images import resize_references
from unipic_pack.unipic_core.conditioning.reference_sizes import MAX_REFERENCES

SMALL = {"reference_budget": 64, "width": 64, "height": 64}

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def counted(tiny, monkeypatch):
    """(clip, vae) of the golden model, and how many texts and pictures they were given."""
    clip, vae = tiny
    counts = {"text": 0, "vae": 0}

    def counting(name, function, count):
        def wrapped(given):
            counts[name] += count(given)
            return function(given)

        return wrapped

    monkeypatch.setattr(vae, "encode", counting("vae", vae.encode, len))
    encode = clip.encode_from_tokens_scheduled
    monkeypatch.setattr(clip, "encode_from_tokens_scheduled", counting("text", encode, lambda _: 1))
    return tiny, counts


@pytest.fixture
def batches(monkeypatch):
    """Lets a VAE note the pictures of each of its calls."""

    def watch(vae):
        seen, encode = [], vae.encode
        monkeypatch.setattr(vae, "encode", lambda pictures: seen.append(len(pictures)) or encode(pictures))
        return seen

    return watch


def latents(output):
    return output[0][0][1]["reference_latents"]


def test_nothing_is_encoded_twice(counted):
    parts, counts = counted
    first = run(parts, image(0), image(1), **SMALL)
    assert counts == {"text": 2, "vae": 2}
    again = run(parts, image(0), image(1), prompt="Something else.", **SMALL)
    assert counts == {"text": 3, "vae": 2}  # neither pictures nor the negative
    assert distance(again[1][0][0], first[1][0][0]) == 0
    assert again[1][0][0].shape != again[0][0][0].shape
    run(parts, image(1), image(0), **SMALL)
    assert counts == {"text": 5, "vae": 2}  # the order changes the text's numbers, not the pictures'
    run(parts, image(0), image(2), **SMALL)
    assert counts == {"text": 7, "vae": 3}


@torch.inference_mode()
def test_pictures_of_one_size_are_encoded_together(tiny, batches):
    """With the numbers of one by one, up to rounding; what is known already, or given twice, is not encoded."""
    sizes = [(64, 64), (64, 32), (64, 64), (32, 64), (64, 64)]
    pictures = [to_pictures(image(i, *size))[0] for i, size in enumerate(sizes)]
    vae, seen = tiny[1], batches(tiny[1])
    alone = [composition.reference_latents(vae, [picture])[0] for picture in pictures]
    assert seen == [1] * 5
    composition.clear_caches()
    seen.clear()
    encoded = composition.reference_latents(vae, pictures + pictures[:1])
    assert seen == [3, 1, 1]
    for got, want in zip(encoded, alone + alone[:1], strict=True):
        assert distance(got, want) < 1e-5
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in composition._references._values.values())
    again = composition.reference_latents(vae, [to_pictures(image(9, 64, 64))[0], pictures[2]])
    assert seen[3:] == [1]
    assert torch.equal(again[1], encoded[2])


def test_a_stock_vae_gets_one_picture_at_a_time(tiny, batches):
    """It would read two as the frames of a video."""
    network = WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    vae = comfy.sd.VAE(sd=network.state_dict())
    seen = batches(vae)
    together = latents(run((tiny[0], vae), image(0), image(1), **SMALL))
    assert seen == [1, 1]
    assert [latent.shape[2] for latent in together] == [1, 1]


@torch.inference_mode()
def test_a_full_cache_keeps_what_is_asked_for(tiny, batches):
    """New pictures push out the oldest, but not one of the same run."""
    pictures = [to_pictures(image(i, 32, 32))[0] for i in range(composition.CACHED_REFERENCES + 2)]
    for picture in pictures[2:]:
        composition.reference_latents(tiny[1], [picture])
    seen = batches(tiny[1])
    composition.reference_latents(tiny[1], pictures[:3])
    assert seen == [2]
    assert len(composition._references) == composition.CACHED_REFERENCES


@pytest.fixture
def passes(tiny):
    """A list that grows by one with every pass of the vision tower."""
    seen = []
    hook = tiny[0].cond_stage_model.qwen25_7b.transformer.visual.patch_embed.register_forward_hook(
        lambda *_: seen.append(1)
    )
    yield seen
    hook.remove()


def test_the_vision_tower_sees_a_picture_once(tiny, passes):
    """Prompt, negative, the next prompt and another order take the same; one exchanged picture is one pass."""
    first = run(tiny, image(0), image(1), image(2), **SMALL)
    assert len(passes) == 3
    second = run(tiny, image(0), image(1), image(2), prompt="Something else.", **SMALL)
    run(tiny, image(2), image(0), image(1), **SMALL)
    assert len(passes) == 3
    run(tiny, image(2), image(0), image(3), **SMALL)
    assert len(passes) == 4
    for shared, prompt in ((first, "Blend them."), (second, "Something else.")):
        composition.clear_caches()
        passes.clear()
        alone = run(tiny, image(0), image(1), image(2), prompt=prompt, negative_prompt=prompt, **SMALL)
        assert len(passes) == 3, "freed with the other caches"
        assert torch.equal(alone[0][0][0], shared[0][0][0])
    composition.clear_caches()
    references = resize_references([Image.new("RGB", (64, 64))], 64)
    tower = tiny[0].cond_stage_model.qwen25_7b.transformer.visual
    tower.forward = tower.forward  # as another node pack may do
    try:
        for text in ("a", "b"):
            encode_prompt(tiny[0], text, references)
    finally:
        del tower.forward
    assert len(passes) == 3 + 2, "somebody else's tower is asked every time"


def test_a_changed_tower_is_noticed(tiny, passes):
    """Patched by ComfyUI, which says so by the patches' id, and changed in place."""
    clip, vae = tiny
    before = run(tiny, image(0), **SMALL)
    name = "qwen25_7b.transformer.visual.merger.ln_q.weight"
    patched = clip.clone()
    assert patched.add_patches({name: ("diff", (torch.ones(32),))})
    changed = run((patched, vae), image(0), **SMALL)
    assert len(passes) == 2
    assert distance(changed[0][0][0], before[0][0][0]) > 1e-3
    assert distance(run(tiny, image(0), prompt="x", **SMALL)[1][0][0], before[1][0][0]) == 0
    passes.clear()
    norm = clip.cond_stage_model.get_submodule(name.removesuffix(".weight"))
    stored = norm.weight.detach().clone()
    try:
        norm.load_state_dict({"weight": stored + 1})
        assert distance(run(tiny, image(0), **SMALL)[0][0][0], changed[0][0][0]) == 0
    finally:
        norm.load_state_dict({"weight": stored})
    assert len(passes) == 1


def test_changed_weights_are_noticed(counted):
    parts, counts = counted
    before = run(parts, image(0), **SMALL)
    layer = parts[1].first_stage_model.quant_conv
    stored = layer.bias.detach().clone()
    try:
        layer.load_state_dict({**layer.state_dict(), "bias": stored + 1})
        after = run(parts, image(0), **SMALL)
    finally:
        layer.load_state_dict({**layer.state_dict(), "bias": stored})
    assert counts == {"text": 2, "vae": 2}
    assert distance(after[0][0][1]["reference_latents"][0], before[0][0][1]["reference_latents"][0]) > 0.5


def test_patches_and_layers_of_the_clip_are_noticed(counted):
    (clip, vae), counts = counted
    run((clip, vae), image(0), **SMALL)
    patched = clip.clone()
    patched.add_patches({"qwen25_7b.transformer.model.norm.weight": ("diff", (torch.ones(32),))})
    changed = run((patched, vae), image(0), **SMALL)
    assert distance(changed[1][0][0], run((clip, vae), image(0), **SMALL)[1][0][0]) > 1e-2
    assert counts["vae"] == 1


def test_caches_are_small_and_on_the_cpu(tiny):
    for i in range(composition.CACHED_REFERENCES + 2):
        run(tiny, image(i), reference_budget=32, width=32, height=32)
    assert len(composition._references) == composition.CACHED_REFERENCES
    assert len(composition._texts) == composition.CACHED_TEXTS
    assert all(x.device.type == "cpu" for x in composition._references._values.values())
    assert len(composition.vision._embeddings) == MAX_REFERENCES
    assert all(x.device.type == "cpu" for x in composition.vision._embeddings.values())


def test_a_later_node_cannot_change_what_is_kept(tiny):
    sizes = {"reference_budget": 32, "width": 32, "height": 32}
    first = run(tiny, image(), **sizes)
    first[1][0][1]["reference_latents"].clear()
    first[1][0][1]["strength"] = 0
    second = run(tiny, image(), **sizes)
    assert len(second[1][0][1]["reference_latents"]) == 1
    assert "strength" not in second[1][0][1]
