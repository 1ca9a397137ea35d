"""The text side of cached samples: encoder inputs from cached pictures, and embeddings of a frozen encoder on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from unipic_core.pipeline.text import EncoderInputs, TextEncoder
from unipic_core.sequence import TextCond
from unipic_core.vision import grid_thw, vision_patches, vision_tokens

from .cache import Bucket, fingerprint

BATCH = 64


def encoder_inputs(text: TextEncoder, bucket: Bucket, rows: np.ndarray, prompts: Sequence[str]) -> EncoderInputs:
    """What `TextEncoder.prepare` gives for the same pictures, from the cached uint8 arrays."""
    index = torch.from_numpy(rows)
    pictures = [v[index].permute(0, 3, 1, 2).float() / 255 for v in bucket.vision]
    patches = [vision_patches(p) for p in pictures]
    counts = [vision_tokens(*p.shape[-2:]) for p in pictures]
    grid = torch.tensor([grid_thw(*p.shape[-2:]) for p in pictures] * len(rows), dtype=torch.long)
    values = torch.cat([p[i] for i in range(len(rows)) for p in patches])
    ids = [torch.tensor(text.prompt_ids(prompt, counts)) for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=text.pad_id)
    lengths = torch.tensor([len(i) for i in ids])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return {"input_ids": padded, "attention_mask": mask, "pixel_values": values, "image_grid_thw": grid}


def encode_prompts(text: TextEncoder, buckets: Mapping[str, Bucket], folder: Path) -> dict[str, list[TextCond]]:
    """Embeddings of every sample with its prompt; read from `folder` if this encoder made them before."""
    weights = fingerprint(text.network)  # reads the whole encoder: once, not per bucket
    return {name: _encode_bucket(text, weights, name, bucket, folder) for name, bucket in buckets.items()}


def _encode_bucket(text: TextEncoder, weights: str, name: str, bucket: Bucket, folder: Path) -> list[TextCond]:
    path = folder / f"text-{_key(text, weights, name, bucket)}.safetensors"
    if not path.exists():
        made = _encode_all(text, bucket, f"text {name}")
        mask = made.mask if made.mask is not None else torch.ones(made.embeds.shape[:2], dtype=torch.bool)
        aside = path.with_suffix(f".partial-{os.getpid()}")
        save_file({"embeds": made.embeds.bfloat16(), "mask": mask}, aside)
        os.replace(aside, path)
    kept = load_file(path)
    lengths = kept["mask"].sum(1).tolist()
    return [TextCond(e[None, :n].float()) for e, n in zip(kept["embeds"], lengths, strict=True)]


def _key(text: TextEncoder, weights: str, name: str, bucket: Bucket) -> str:
    """Sixteen digits of all that the embeddings depend on: encoder, positions, prompts and pictures."""
    digest = hashlib.sha256(f"{weights} {text.positions} {name}".encode())
    for prompt in bucket.prompts:
        digest.update(repr(text.prompt_ids(prompt, [1] * len(bucket.vision))).encode())
    for pictures in bucket.vision:
        digest.update(pictures.sum(dim=(1, 2, 3), dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _encode_all(text: TextEncoder, bucket: Bucket, title: str) -> TextCond:
    parts = []
    for start in tqdm(range(0, len(bucket), BATCH), desc=title, leave=False):
        rows = np.arange(start, min(start + BATCH, len(bucket)))
        parts.append(text.forward(encoder_inputs(text, bucket, rows, [bucket.prompts[int(i)] for i in rows])))
    return TextCond.stack(parts)
