"""Text encoder inputs from cached pictures, encoder fingerprints, and cached embeddings of a frozen encoder."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unipic_core.conditioning.prompt import prompt_text
from unipic_core.conditioning.sequence import TextCond
from unipic_core.conditioning.vision import grid_thw, vision_patches, vision_tokens
from unipic_core.pipeline.text_encoder import LOCAL, EncoderInputs, TextEncoder, load_tokenizer, positions_of
from unipic_core.weights.files import open_weights
from unipic_core.weights.text_encoder import HEAD, open_encoder, readable_encoder_errors

from .shards import Rows, Shard, drop_vision, has_text, text_path, write_shard

UNCOND_PROMPT = " "
"""Prompt of the unconditional branch, as in the released recipe."""

TOKENS_PER_BATCH = 16384
MAX_SAMPLES_PER_BATCH = 64


def encoder_inputs(text: TextEncoder, rows: Rows, prompts: Sequence[str]) -> EncoderInputs:
    """Encoder inputs from the cached uint8 pictures, equal to `TextEncoder.prepare` on the original pictures."""
    return _inputs(text, rows.vision, prompts)


def _inputs(text: TextEncoder, vision: Sequence[Tensor], prompts: Sequence[str]) -> EncoderInputs:
    """vision: uint8 [n, H, W, 3] per reference; n prompts."""
    pictures = [v.permute(0, 3, 1, 2).float() / 255 for v in vision]
    patches = [vision_patches(p) for p in pictures]
    counts = [vision_tokens(*p.shape[-2:]) for p in pictures]
    grid = torch.tensor([grid_thw(*p.shape[-2:]) for p in pictures], dtype=torch.long).reshape(-1, 3)
    no_patches = text.prepare([[]], [UNCOND_PROMPT])["pixel_values"]  # [0, 1176]
    samples = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([text.prompt_ids(prompt, counts)])
        values = torch.cat([no_patches, *(p[i] for p in patches)])
        mask = torch.ones_like(ids)
        samples.append({"input_ids": ids, "attention_mask": mask, "pixel_values": values, "image_grid_thw": grid})
    return text.collate(samples)


def mixed_encoder_inputs(
    text: TextEncoder, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]
) -> EncoderInputs:
    """Encoder inputs of samples with different references. pictures: per sample uint8 [H, W, 3] each."""
    return text.collate(
        [_inputs(text, [p[None] for p in sample], [prompt]) for sample, prompt in zip(pictures, prompts, strict=True)]
    )


# --- which encoder ---------------------------------------------------------------------------------------------------

_SETTINGS = {
    "text_config": (
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters"),
        *("layer_types", "sliding_window"),
    ),
    "vision_config": (
        *("num_heads", "hidden_act", "fullatt_block_indexes", "window_size"),
        *("patch_size", "spatial_merge_size", "temporal_patch_size"),
    ),
}
"""Encoder settings that change embeddings and do not show in the shapes of the weights."""


def text_fingerprint(folder: Path) -> str:
    """Fingerprint of the encoder in a pipeline folder (12 hex digits), read from its files without loading the model.

    It covers all that embeddings depend on besides prompts and pictures: weights (rounded to bfloat16, whatever their
    storage type), position numbering, tokenizer and template.
    """
    paths = [p for part in ("text_encoder", "tokenizer") for p in sorted((folder / part).glob("*"))]
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return _folder_fingerprint(folder, tuple(stats))


@lru_cache(maxsize=4)
def _folder_fingerprint(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """stamp: names, sizes and times of the files, so that unchanged files are read once per process."""
    from transformers import Qwen2_5_VLConfig

    open_encoder(folder)
    with readable_encoder_errors(f"the encoder in {folder} cannot be read"):
        tokenizer = load_tokenizer(folder / "tokenizer")
        config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder", **LOCAL)
    weights = open_weights(folder / "text_encoder")
    return _fingerprint(((name, weights.get(name)) for name in weights), config, tokenizer, positions_of(config))


def encoder_fingerprint(text: TextEncoder) -> str:
    """Fingerprint of an encoder in memory; equals `text_fingerprint` of its files."""
    weights = text.network.state_dict().items()
    return _fingerprint(weights, text.model.config, text.tokenizer, text.positions)


def _fingerprint(weights: Iterable[tuple[str, Tensor]], config: Any, tokenizer: Any, positions: str) -> str:
    digests = {bare: _digest(w) for name, w in weights if (bare := _bare(name))}
    settings = {part: {k: _value(getattr(config, part), k) for k in keys} for part, keys in _SETTINGS.items()}
    probe = prompt_text("Put the 12 red apples of image 1, naïvely, über den Tisch. 把苹果放在桌上!", 2)
    tokenization = {"vocabulary": sorted(tokenizer.get_vocab().items()), "probe": tokenizer(probe)["input_ids"]}
    content = json.dumps([sorted(digests.items()), settings, tokenization, positions], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _bare(name: str) -> str:
    """Weight name without the prefixes that differ between files and modules; "" for the unused head."""
    return "" if name.startswith(HEAD) else re.sub(r"\b(model|language_model)\.", "", name)


def _value(config: object, key: str) -> Any:
    value = getattr(config, key, None)
    return sorted(value.items()) if isinstance(value, Mapping) else value


def _digest(w: Tensor) -> str:
    data = w.detach().cpu().bfloat16().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


# --- embeddings on disk ----------------------------------------------------------------------------------------------


FP8 = "-fp8"
"""End of the name under which an encoder's embeddings in fp8 are stored."""

LARGEST_FP8 = 448.0


def encode_text(
    shards: Sequence[Shard], fingerprint: str, text: TextEncoder, keep_vision: Callable[[Shard], bool]
) -> None:
    """Write the embeddings of each shard with a progress bar, then drop its pictures unless keep_vision(shard).

    fingerprint: with the ending FP8 they are stored in fp8, and the error is printed.
    """
    total = sum(len(prompts) for shard in shards for prompts in shard.prompts.values())
    errors, start = [], time.perf_counter()
    with tqdm(total=total, unit=" samples", desc="text") as bar:
        for number, path in enumerate([shard.path for shard in shards]):
            shard = Shard(path)  # anew: another run on the same part may have been here meanwhile
            if has_text(shard, fingerprint):
                bar.update(sum(map(len, shard.prompts.values())))
            else:
                errors += encode_shard(text, shard, fingerprint, bar)
            if not number and bar.n and total > LONG:
                bar.write(f"text: about {total / bar.n * (time.perf_counter() - start) / 3600:.2f} hours, measured")
            if not keep_vision(shard):
                drop_vision(shard.path)
    if errors:
        print(f"fp8 changes the text embeddings by {100 * max(errors):.2f}% of their norm at most in a shard")


LONG = 1000
"""Samples from which on the time of the first shard is told."""


def stored_fp8(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [..., D] -> (float8_e4m3fn, scales [..., 1] float32): a scale for each token."""
    scale = embeds.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST_FP8
    return (embeds.float() / scale).to(torch.float8_e4m3fn), scale


def in_fp8(tensors: dict[str, Tensor]) -> float:
    """Replace the embeddings by fp8 and scales; returns the relative error (norm of the change over the norm)."""
    change = norm = 0.0
    for name in list(tensors):
        exact = tensors[name].float()
        tensors[name], tensors[f"{name}_scale"] = stored_fp8(exact)
        change += float((tensors[name].float() * tensors[f"{name}_scale"] - exact).square().sum())
        norm += float(exact.square().sum())
    return (change / max(norm, 1e-30)) ** 0.5


def encode_rows(text: TextEncoder, rows: Rows) -> Rows:
    """The rows with embeddings made now, float32 on the CPU, in place of pictures."""
    with tqdm(disable=True) as bar:
        pairs = list(_encode(text, rows.vision, rows.prompts, bar))
    cond, uncond = (TextCond.stack([TextCond(e[None].float()) for e in some]) for some in zip(*pairs, strict=True))
    return replace(rows, cond=cond, uncond=uncond)


@torch.no_grad()
def encode_mixed(
    text: TextEncoder, pictures: Sequence[Sequence[Tensor]], prompts: Sequence[str]
) -> tuple[TextCond, TextCond]:
    """Conditional and unconditional embeddings of samples with different references, float32 on the CPU.

    pictures: per sample uint8 [H, W, 3] each.
    """
    inputs = mixed_encoder_inputs(text, pictures, prompts)
    blank = mixed_encoder_inputs(text, pictures, [UNCOND_PROMPT] * len(prompts))
    vision_states = text.vision_of(inputs)
    texts = text.forward(inputs, vision_states), text.forward(blank, vision_states)
    cond, uncond = (replace(one, embeds=one.embeds.float()).to("cpu") for one in texts)
    return cond, uncond


def encode_shard(text: TextEncoder, shard: Shard, fingerprint: str, bar: tqdm) -> list[float]:
    """Write the text shard of one latent shard (layout: shards.py); returns the error of fp8, if that is asked for."""
    tensors: dict[str, Tensor] = {}
    lengths, shared = {}, {}
    for shapes, prompts in shard.prompts.items():
        vision = shard.pictures(shapes, "vision")
        start = shared[shapes] = shared_tokens(text, vision)
        embeds, unconds = zip(*_encode(text, vision, prompts, bar), strict=True)
        tensors[f"{shapes}/embeds"] = torch.cat(embeds)
        tensors[f"{shapes}/uncond"] = torch.stack([u[start:] for u in unconds])
        lengths[shapes] = [len(e) for e in embeds]
    errors = [in_fp8(tensors)] if fingerprint.endswith(FP8) and tensors else []
    metadata = {"of": shard.text_digest, "lengths": lengths, "shared": shared, "fp8_error": errors}
    write_shard(text_path(shard.path, fingerprint), tensors, metadata)
    return errors


@torch.no_grad()
def _encode(
    text: TextEncoder, vision: Sequence[Tensor], prompts: Sequence[str], bar: tqdm
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield conditional and unconditional embeddings [L, D] of every sample, bfloat16 on the CPU."""
    counts = [vision_tokens(*v.shape[1:3]) for v in vision]
    longest = max(len(text.prompt_ids(prompt, counts)) for prompt in prompts)
    blank = torch.tensor(text.prompt_ids(UNCOND_PROMPT, counts))
    size = min(max(TOKENS_PER_BATCH // longest, 1), MAX_SAMPLES_PER_BATCH)
    for at in range(0, len(prompts), size):
        pictures, chunk = [v[at : at + size] for v in vision], prompts[at : at + size]
        inputs = _inputs(text, pictures, chunk)
        vision_states, ids = text.vision_of(inputs), blank.expand(len(chunk), -1)
        cond = text.forward(inputs, vision_states)
        uncond = text.forward({**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, vision_states)
        masks = torch.ones(cond.embeds.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask.cpu()
        for e, m, u in zip(cond.embeds.bfloat16().cpu(), masks, uncond.embeds.bfloat16().cpu(), strict=True):
            yield e[m], u
        bar.update(len(chunk))


def shared_tokens(text: TextEncoder, vision: Sequence[Tensor]) -> int:
    """Number of leading embeddings that do not depend on the prompt: references and their marks."""
    if not vision:
        return 0
    ids = text.prompt_ids(UNCOND_PROMPT, [vision_tokens(*v.shape[1:3]) for v in vision])
    last = max(i for i, token in enumerate(ids) if token == text.image_token)
    return last + 2 - text.dropped  # the mark that closes the last picture
