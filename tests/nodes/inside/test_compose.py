"""MultiImageCompose: sizes, numbers, bad input, and the node in a graph."""

import asyncio
import importlib
import json
import logging
import sys

import execution
import pytest
import torch
from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus
from comfyui import CASES
from compose_tools import distance, image, run
from PIL import Image
from safetensors.torch import load_file
from unipic_pack.nodes.compose import MultiImageCompose
from unipic_pack.nodes.host import composition
from unipic_pack.nodes.host.pictures.images import to_image
from unipic_pack.nodes.host.pictures.vae import load_vae
from unipic_pack.nodes.host.recipe_attachment import RecipeAttachment, attach
from unipic_pack.nodes.host.text.encoder import load_clip
from unipic_pack.unipic_core.conditioning.images import load_image, resize_references
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.weights.recipe import Recipe, recipe_of

import nodes as comfy_nodes

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def small(nano):
    clip = load_clip(nano)
    attach(clip.patcher, RecipeAttachment(recipe_of(nano)))
    return clip, load_vae(nano)


def normalised(vae, latent):
    mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std]).reshape(2, 1, -1, 1, 1, 1)
    return (latent - mean) / std


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(tiny, golden, name):
    folder = golden / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    images = [to_image(load_image(folder / f"image_{i + 1}.png")) for i in range(len(case["reference_sizes"]))]
    sizes = {k: case[k] for k in ("negative_prompt", "width", "height", "reference_budget")}
    positive, negative, latent = run(tiny, *images, prompt=case["prompt"], **sizes)
    for cond, which in ((positive, "prompt_embeds"), (negative, "negative_prompt_embeds")):
        [[embeds, extra]] = cond
        assert distance(embeds, tensors[which]) < 1e-4
        for i, reference in enumerate(extra["reference_latents"]):
            assert distance(normalised(tiny[1], reference), tensors[f"reference_latent_{i + 1}"]) < 1e-4
        assert len(extra["reference_latents"]) == len(images)
    assert latent["samples"].shape == (1, 4, 1, case["height"] // 8, case["width"] // 8)


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_numbers_of_the_pipeline(small, nano, golden, count):
    root = str(golden.parents[1])
    if root not in sys.path:
        sys.path.append(root)  # behind ComfyUI, whose own `nodes` must be found first
    pipe = importlib.import_module("unipic_core.pipeline").UniPicPipeline.from_pretrained(
        nano, torch_dtype=torch.float32, device="cpu"
    )
    images = [image(i, 40 + 30 * i, 64) for i in range(count)]
    positive, negative, latent = run(small, *images)
    pictures = [Image.fromarray((x[0] * 255).round().to(torch.uint8).numpy()) for x in images]
    references = resize_references(pictures, recipe_of(nano).reference_budget)
    with torch.no_grad():
        for cond, prompt in ((positive, "Blend them."), (negative, " ")):
            assert distance(cond[0][0], pipe.text_encoder.encode([references], [prompt]).embeds) < 1e-4
        wanted = pipe._encode_references(references)
    got = positive[0][1].get("reference_latents", [])
    assert len(got) == len(wanted) == count
    for a, b in zip(got, wanted, strict=True):
        assert distance(normalised(small[1], a), b) < 1e-4
    assert latent["samples"].shape[1:3] == (16, 1)
    assert not latent["samples"].any()


def test_stock_node_with_our_clip_and_vae(tiny):
    """Its own sizes (a megapixel each) and labels; so not our numbers, but it runs and has the right shapes."""
    with torch.inference_mode():
        [cond] = TextEncodeQwenImageEditPlus.execute(tiny[0], "Go.", tiny[1], image(0, 64, 32)).args
    [[embeds, extra]] = cond
    assert torch.isfinite(embeds).all()
    assert [tuple(x.shape) for x in extra["reference_latents"]] == [(1, 4, 1, 91, 181)]


# --- sizes ---------------------------------------------------------------------------------------------------------


def size_of(latent):
    return tuple(8 * side for side in reversed(latent["samples"].shape[-2:]))


def test_output_sizes(small, nano):
    budget = recipe_of(nano).output_budget
    assert size_of(run(small, image(0, 100, 100))[2]) == (budget, budget)
    assert size_of(run(small)[2]) == (budget, budget)
    wide = size_of(run(small, image(0, 120, 60))[2])
    assert wide[0] > wide[1]
    assert size_of(run(small, image(), width=64, height=48)[2]) == (64, 48)
    assert size_of(run(small, image(0, 100, 50), height=64)[2]) == (128, 64)
    assert run(small, batch_size=3)[2]["samples"].shape[0] == 3
    with pytest.raises(UniPicError, match="over this model's"):
        run(small, width=1024, height=1024)
    with pytest.raises(UniPicError, match="multiples of 16, got 65x64; use 64x64"):
        run(small, width=65, height=64)


def test_weights_without_a_recipe_make_any_size(tiny):
    assert size_of(run(tiny, width=1328, height=1328)[2]) == (1328, 1328)
    assert size_of(run(tiny)[2]) == (1024, 1024)


def test_reference_budget(small):
    def pixels(**inputs):
        [[_, extra]] = run(small, image(0, 64, 64), image(1, 64, 64), **inputs)[0]
        return sum(64 * x.shape[-1] * x.shape[-2] for x in extra["reference_latents"])

    assert pixels(reference_budget=64) == 2 * 32 * 32 or pixels(reference_budget=64) == 2 * 64 * 64
    assert pixels(reference_budget=192) > pixels(reference_budget=96)
    assert pixels() == pixels(reference_budget=facts_budget(small))
    with pytest.raises(UniPicError, match="reference budget must be from 32"):
        pixels(reference_budget=5)


def test_the_models_recipe_sets_the_sizes(small, nano_model, nano):
    """That of a LoRA, which is attached to the MODEL alone."""
    model = nano_model.clone()
    attach(model, RecipeAttachment(Recipe(reference_budget=128, output_budget=64)))

    def sides(**inputs):
        positive, _, latent = run(small, image(0, 200, 200), **inputs)
        [reference] = positive[0][1]["reference_latents"]
        return tuple(8 * side for side in reference.shape[-2:]), size_of(latent)

    assert sides(model=model) == ((128, 128), (64, 64))
    recipe = recipe_of(nano)
    [seen] = resize_references([Image.new("RGB", (200, 200))], recipe.reference_budget)
    assert sides() == sides(model=nano_model) == (seen.size, (recipe.output_budget,) * 2)
    attach(model, RecipeAttachment(Recipe(output_budget=512)))
    assert size_of(run(small, width=512, height=512, model=model)[2]) == (512, 512)


def facts_budget(parts):
    return parts[0].patcher.get_attachment("unipic").recipe.reference_budget


# --- bad input -----------------------------------------------------------------------------------------------------


def test_all_of_a_batch_are_references(tiny):
    sizes = {"reference_budget": 96, "width": 32, "height": 32}
    together = run(tiny, torch.cat([image(0), image(1)]), image(2), batches="all", **sizes)
    apart = run(tiny, image(0), image(1), image(2), **sizes)
    assert distance(together[0][0][0], apart[0][0][0]) == 0
    assert len(together[0][0][1]["reference_latents"]) == 3
    with pytest.raises(UniPicError, match="at most 6 pictures can be composed, got 7, 5 of them from image_1"):
        run(tiny, torch.cat([image(0)] * 5), torch.cat([image(1)] * 2), batches="all", **sizes)


def test_an_animation_counts_as_its_first_frame(tiny, caplog):
    """Load Image gives every frame, and a mask for each."""
    sizes = {"reference_budget": 96, "width": 32, "height": 32}
    frames, holes = torch.cat([image(i) for i in range(8)]), torch.zeros(8, 50, 70)
    holes[0, :20], holes[1] = 1, 1
    with caplog.at_level(logging.WARNING):
        moving = run(tiny, frames, image(9), masks={"mask_1": holes}, **sizes)
    still = run(tiny, frames[:1], image(9), masks={"mask_1": holes[:1]}, **sizes)
    assert distance(moving[0][0][0], still[0][0][0]) == 0
    assert len(moving[0][0][1]["reference_latents"]) == 2
    assert "image_1 has 8 pictures, and only the first is used; set batches to all" in caplog.text
    assert "in the prompt" not in caplog.text


@pytest.mark.parametrize(
    ("sockets", "said"),
    [
        ((1, 2, 3), None),
        (
            (1, 3),
            "image_2 is empty, muted or bypassed, so later pictures are renumbered; image_3 is image 2",
        ),
        (
            (2,),
            "image_1 is empty, muted or bypassed, so later pictures are renumbered; image_2 is image 1",
        ),
        ((3, 6), "image_1, image_2, image_4, image_5 are empty, muted or bypassed, so later pictures are renumbered"),
    ],
)
def test_a_muted_picture_is_told(tiny, caplog, sockets, said):
    pictures = {f"image_{i}": image(i) for i in sockets}
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        MultiImageCompose.execute(*tiny, "Go.", width=32, height=32, reference_budget=96, images=pictures)
    assert said is None or said in caplog.text
    assert bool(caplog.records) == bool(said)


def test_numbers_behind_a_batch_are_told(tiny, caplog):
    frames = torch.cat([image(i) for i in range(3)])
    with caplog.at_level(logging.WARNING):
        run(tiny, frames, image(9), batches="all", reference_budget=96, width=32, height=32)
    assert "image_1 is image 1 to image 3 in the prompt; image_2 is image 4 in the prompt" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("the hat of image 2 on image 1", ""),
        ("Blend them.", ""),
        ("the hat of image 5 on image 1", "the prompt names image 5, and there are 2 pictures; the prompt never names"),
        ("the panda of image 1", "the prompt never names image 2"),
        ("图1里的熊猫", "the prompt never names image 2"),
    ],
)
def test_a_prompt_that_names_other_pictures(tiny, caplog, prompt, said):
    with caplog.at_level(logging.WARNING):
        run(tiny, image(0), image(1), prompt=prompt, reference_budget=96, width=32, height=32)
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)


def test_no_images_warns(tiny, caplog):
    with caplog.at_level(logging.WARNING):
        positive, _, _ = run(tiny, width=32, height=32)
    assert "no images are connected" in caplog.text
    assert "reference_latents" not in positive[0][1]


def test_masks_go_with_their_images(tiny):
    sizes = {"reference_budget": 64, "width": 32, "height": 32}
    white, hole = torch.ones_like(image(1)), torch.ones(1, 64, 64)
    masked = run(tiny, image(0), image(1), masks={"mask_2": hole}, **sizes)
    blank = run(tiny, image(0), white, **sizes)
    assert distance(masked[0][0][0], blank[0][0][0]) == 0
    with pytest.raises(UniPicError, match="mask_3 is connected, but image_3 is not"):
        run(tiny, image(0), masks={"mask_3": hole}, **sizes)


def test_pictures_that_are_odd(tiny):
    sizes = {"reference_budget": 64, "width": 32, "height": 32}
    rgba = torch.cat([image(), torch.ones_like(image()[..., :1])], dim=-1)
    assert distance(run(tiny, rgba, **sizes)[0][0][0], run(tiny, image(), **sizes)[0][0][0]) == 0
    for odd in (torch.rand(1, 1, 1, 3), torch.rand(1, 20, 30, 1), torch.rand(1, 1, 200, 3)):
        [[embeds, extra]] = run(tiny, odd, image(), **sizes)[0]
        assert torch.isfinite(embeds).all()
        assert len(extra["reference_latents"]) == 2
    [[embeds, _]] = run(tiny, image(), prompt="", **sizes)[0]
    assert embeds.shape[1] > 0
    marked = run(tiny, image(), prompt="<|image_pad|>", negative_prompt="<|im_end|>", **sizes)
    assert marked[0][0][0].shape[1] > embeds.shape[1]


@pytest.mark.parametrize("texts", [{"prompt": "astronaut \ud83d"}, {"negative_prompt": "astronaut \ud83d"}])
def test_half_an_emoji_is_refused_before_anything_is_encoded(tiny, monkeypatch, texts):
    monkeypatch.setattr(composition, "reference_latents", None)
    with pytest.raises(UniPicError, match=r"not valid Unicode: character 11 is U\+D83D, half of a surrogate pair"):
        run(tiny, image(), **texts)
    monkeypatch.undo()
    [[embeds, _]] = run(tiny, image(), prompt="astronaut \U0001f680", reference_budget=64, width=32, height=32)[0]
    assert torch.isfinite(embeds).all()


def test_another_kind_of_vae(tiny):
    class Flat:
        latent_dim = 2

        def spacial_compression_encode(self):
            return 8

    with pytest.raises(UniPicError, match="must be the Qwen-Image VAE"):
        run((tiny[0], Flat()), image())


# --- in a graph ----------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(tiny, monkeypatch):
    """Runs MultiImageCompose with these inputs in ComfyUI's executor; returns its outputs and the error, if any."""
    seen = []

    class Parts:
        RETURN_TYPES, FUNCTION, INPUT_TYPES = ("CLIP", "VAE"), "give", classmethod(lambda _: {"required": {}})

        def give(self):
            return tiny

    class Picture:
        RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "give"
        INPUT_TYPES = classmethod(lambda _: {"required": {"index": ("INT", {})}})

        def give(self, index):
            return image(index), torch.zeros(1, 64, 64)

    class Sink:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "take", True
        INPUT_TYPES = classmethod(
            lambda _: {"required": {"p": ("CONDITIONING",), "n": ("CONDITIONING",), "x": ("LATENT",)}}
        )

        def take(self, p, n, x):
            seen.append((p, n, x))
            return {}

    class Server:
        client_id = last_node_id = last_prompt_id = None

        def send_sync(self, *_):
            pass

    for name, kind in (
        ("Parts", Parts),
        ("Picture", Picture),
        ("Sink", Sink),
        ("MultiImageCompose", MultiImageCompose),
    ):
        monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, name, kind)

    def execute(**inputs):
        prompt = {
            "parts": {"class_type": "Parts", "inputs": {}},
            **{f"p{i}": {"class_type": "Picture", "inputs": {"index": i}} for i in range(1, 8)},
            "node": {
                "class_type": "MultiImageCompose",
                "inputs": {
                    "clip": ["parts", 0],
                    "vae": ["parts", 1],
                    "prompt": "Go.",
                    "negative_prompt": " ",
                    "width": 32,
                    "height": 32,
                    "batch_size": 1,
                    "reference_budget": 64,
                    **inputs,
                },
            },
            "sink": {"class_type": "Sink", "inputs": {"p": ["node", 0], "n": ["node", 1], "x": ["node", 2]}},
        }
        executor = execution.PromptExecutor(Server(), cache_args={"ram": 0, "ram_inactive": 0, "lru": 0})

        async def both():
            valid, error, outputs, node_errors = await execution.validate_prompt("1", prompt, None)
            assert valid, (error, node_errors)
            await executor.execute_async(prompt, "1", {}, outputs)

        asyncio.run(both())
        errors = [m["exception_message"] for kind, m in executor.status_messages if kind == "execution_error"]
        return (seen.pop() if seen else None), (errors or [None])[0]

    return execute


def test_growing_sockets(graph):
    (positive, _, latent), error = graph(
        **{"images.image_1": ["p1", 0], "images.image_3": ["p2", 0], "masks.mask_3": ["p2", 1]}
    )
    assert error is None
    assert len(positive[0][1]["reference_latents"]) == 2
    assert latent["samples"].shape == (1, 4, 1, 4, 4)
    (positive, _, _), error = graph()
    assert error is None
    assert "reference_latents" not in positive[0][1]


def test_a_seventh_socket_is_an_error_and_the_next_run_works(graph):
    seven = {f"images.image_{i}": [f"p{i}", 0] for i in range(1, 8)}
    outputs, error = graph(**seven)
    assert outputs is None
    assert "at most 6 pictures" in error
    assert "images.image_7" in error
    seven.pop("images.image_7")
    (positive, _, _), error = graph(**seven)
    assert error is None
    assert len(positive[0][1]["reference_latents"]) == 6


def test_every_input_has_a_tooltip():
    for entry in MultiImageCompose.define_schema().inputs:
        assert entry.tooltip
        template = getattr(entry, "template", None)
        assert template is None or template.input.tooltip
