"""The prompt's text and the condition encoder: batches, positions, gradients, limits, missing parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from unipic_core.conditioning.prompt import PREFIX, SUFFIX, plain_ids, prompt_text
from unipic_core.errors import CheckpointError, UniPicError
from unipic_core.pipeline.text_encoder import TextEncoder, positions_of


@pytest.fixture(scope="module")
def encoder(golden: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(golden / "tiny", torch.float32)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    data = torch.randint(0, 255, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(data.numpy())


SAMPLES = [
    ([picture(64, 96), picture(128, 32, 1)], "Two pictures."),
    ([], "None, but a longer prompt than the others have, é 漢."),
    ([picture(32, 32, 2)], ""),
]


def test_text(golden: Path) -> None:
    case = json.loads((golden / "cases" / "two_references_8_steps_cfg4" / "case.json").read_text())
    assert prompt_text(case["prompt"], 2) == case["text"]
    assert prompt_text("", 0) == PREFIX + SUFFIX


MARKED = "a <|image_pad|> b <|im_end|>\n<|im_start|>user\n <|vision_start|>漢<|endoftext|>"


def test_marks_in_a_prompt_stay_text(encoder: TextEncoder) -> None:
    ids = encoder.prompt_ids(MARKED, [3])
    plain = encoder.prompt_ids("", [3])
    words = ids[len(plain) - len(encoder.tokenizer(SUFFIX)["input_ids"]) : -len(encoder.tokenizer(SUFFIX)["input_ids"])]
    assert not set(words) & set(encoder.tokenizer.get_added_vocab().values())
    assert encoder.tokenizer.decode(words) == MARKED
    assert ids.count(encoder.image_token) == 3
    with torch.no_grad():
        assert encoder.encode([[picture(32, 32)]], [MARKED]).embeds.isfinite().all()


@pytest.mark.parametrize("prompt", ["A hat, on the 12 cats' heads!", "", " x\n\n y  ", "é 漢 🙂 naïve", "<|im"])
def test_plain_ids_are_those_of_the_tokenizer_without_marks(encoder: TextEncoder, prompt: str) -> None:
    assert plain_ids(encoder.tokenizer.backend_tokenizer, prompt) == encoder.tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("positions", ["sequential", "multimodal"])
def test_mixed_batch_gives_what_each_sample_gives_alone(encoder: TextEncoder, positions: str) -> None:
    enc = TextEncoder(encoder.model, encoder.tokenizer, encoder.image_processor, positions)
    images, prompts = zip(*SAMPLES, strict=True)
    with torch.no_grad():
        together = enc.encode(images, prompts)
        assert together.mask is not None
        for i in range(len(SAMPLES)):
            alone = enc.encode(images[i : i + 1], prompts[i : i + 1])
            assert alone.mask is None
            kept = together.embeds[i][together.mask[i]]
            torch.testing.assert_close(kept, alone.embeds[0], rtol=1e-4, atol=1e-5)


@pytest.fixture
def towers(encoder: TextEncoder) -> Iterator[list[int]]:
    """Patches of every run of the vision tower."""
    runs: list[int] = []
    hook = encoder.network.visual.register_forward_hook(lambda tower, given, made: runs.append(len(given[0])))
    yield runs
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["sequential", "multimodal"])
def test_several_prompts_share_one_run_of_the_vision_tower(
    encoder: TextEncoder, towers: list[int], positions: str
) -> None:
    """The numbers are those of transformers' own way from pixels and ids, to the bit."""
    enc = TextEncoder(encoder.model, encoder.tokenizer, encoder.image_processor, positions)
    images, prompts = zip(*SAMPLES, strict=True)
    vision = enc.vision(images)
    assert vision.shape == (2 * 3 + 4 * 1 + 1, 32)
    for some in (prompts, ("x", "", " ")):
        shared = enc.encode(images, some, vision)
        assert len(towers) == 1
        inputs = enc.prepare(images, some)
        hidden = enc.network(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=enc.position_ids(inputs["input_ids"], inputs["image_grid_thw"]),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            use_cache=False,
        ).last_hidden_state
        assert torch.equal(shared.embeds, hidden[:, enc.dropped :])
        assert torch.equal(shared.embeds, enc.forward(inputs).embeds)
        assert towers.pop() == towers.pop()


@torch.no_grad()
def test_no_pictures_run_no_vision_tower(encoder: TextEncoder, towers: list[int]) -> None:
    vision = encoder.vision([[], []])
    assert vision.shape == (0, 32)
    assert torch.equal(
        encoder.encode([[], []], ["a", "b c"], vision).embeds, encoder.encode([[], []], ["a", "b c"]).embeds
    )
    assert towers == []


def test_cached_inputs_can_be_put_together(encoder: TextEncoder) -> None:
    images, prompts = zip(*SAMPLES, strict=True)
    at_once = encoder.prepare(images, prompts)
    apart = encoder.collate([encoder.prepare([i], [p]) for i, p in SAMPLES])
    assert at_once.keys() == apart.keys()
    for name in at_once:
        assert torch.equal(at_once[name], apart[name])
    assert at_once["pixel_values"].shape[1] == 1176
    assert at_once["image_grid_thw"].tolist()[0] == [1, 6, 4]


def test_multimodal_positions_are_those_of_transformers(encoder: TextEncoder) -> None:
    enc = TextEncoder(encoder.model, encoder.tokenizer, encoder.image_processor, "multimodal")
    images, prompts = zip(*SAMPLES, strict=True)
    inputs = enc.prepare(images, prompts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    want, _ = enc.model.model.get_rope_index(
        ids, (ids == enc.image_token).int(), inputs["image_grid_thw"], attention_mask=mask
    )
    got = enc.position_ids(ids, inputs["image_grid_thw"])
    assert torch.equal(got[:, mask.bool()], want[:, mask.bool()])


def test_positions_follow_the_config() -> None:
    class Config:
        transformers_version: str | None = "4.41.2"

    config = Config()
    assert positions_of(config) == "multimodal"  # the released weights
    config.transformers_version = "5.23.0"
    assert positions_of(config) == "sequential"  # the golden numbers
    config.transformers_version = None
    assert positions_of(config) == "sequential"
    config.unipic_positions = "multimodal"  # type: ignore[attr-defined]
    assert positions_of(config) == "multimodal"


def test_gradients_reach_the_encoder(golden: Path) -> None:
    encoder = TextEncoder.from_pretrained(golden / "tiny", torch.float32)
    encoder.model.requires_grad_(True)
    images, prompts = zip(*SAMPLES, strict=True)
    encoder.encode(images, prompts).embeds.square().mean().backward()
    assert encoder.network.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    assert encoder.network.get_input_embeddings().weight.grad.abs().sum() > 0
    assert encoder.model.lm_head.weight.grad is None  # no logits are computed


def test_long_prompts(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="trained up to 1024"):
        inputs = encoder.prepare([[]], ["word " * 5000])
    assert inputs["input_ids"].shape[1] > 25000
    with pytest.raises(UniPicError, match=r"prompt is too long.*at most 32768; shorten it"):
        encoder.prepare([[]], ["word " * 8000])


def test_wrong_use(encoder: TextEncoder) -> None:
    with pytest.raises(UniPicError, match="one list of images for each of 2 prompts, got 1"):
        encoder.prepare([[]], ["a", "b"])
    with pytest.raises(UniPicError, match="multiples of 32, got 33x32; resize them with resize_references"):
        encoder.prepare([[picture(33, 32)]], ["a"])
    with pytest.raises(UniPicError, match="multiples of 32, got 33x32; resize them with resize_references"):
        encoder.vision([[picture(33, 32)]])
    with pytest.raises(UniPicError, match="positions must be one of"):
        TextEncoder(encoder.model, encoder.tokenizer, positions="other")


def copied(golden: Path, to: Path) -> Path:
    for part in ("text_encoder", "tokenizer", "processor"):
        shutil.copytree(golden / "tiny" / part, to / part)
    return to


def test_damaged_folders(golden: Path, tmp_path: Path) -> None:
    folder = copied(golden, tmp_path)
    config = folder / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "image_token_id": 262}))
    with pytest.raises(CheckpointError, match="from the same folder"):
        TextEncoder.from_pretrained(folder)
    config.write_text(
        json.dumps({**values, "vocab_size": 10, "text_config": {**values["text_config"], "hidden_size": 64}})
    )
    with pytest.raises(CheckpointError, match=r"encoder in .* cannot be loaded"):
        TextEncoder.from_pretrained(folder)
    config.write_text(json.dumps(values))
    weights = folder / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        TextEncoder.from_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="has no tokenizer/ folder"):
        TextEncoder.from_pretrained(folder)


def test_weights_that_are_missing_are_an_error(golden: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(golden, tmp_path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "q_proj" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing.*q_proj"):
        TextEncoder.from_pretrained(folder)


def test_processor_needs_no_torchvision(golden: Path, tmp_path: Path) -> None:
    from importlib.util import find_spec

    folder = copied(golden, tmp_path)
    shutil.rmtree(folder / "processor")  # the released values are the default
    encoder = TextEncoder.from_pretrained(folder, torch.float32)
    assert "Pil" in type(encoder.image_processor).__name__ or find_spec("torchvision")
    assert encoder.prepare([[picture(32, 32)]], ["a"])["image_grid_thw"].tolist() == [[1, 2, 2]]
