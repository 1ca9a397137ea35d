"""Index of a cache: where every sample's tensors lie, in a few arrays, so that a large set opens in seconds.

Without it each start would parse the header of every shard. `index-NAME.safetensors` (NAME: the text encoder, or
"vision") lies beside the shards and notes their sizes and times; where one differs, the index is built again.

Samples are numbered bucket by bucket, in the order of the buckets' names and of the shards. A part is the samples of
one bucket in one shard, whose tensors are stacked.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from unipic_core.conditioning.sequence import PATCH, TextCond
from unipic_core.errors import CheckpointError
from unipic_core.replacing import replacing

from ..config.run import ConfigError
from .batches import Lengths
from .shards import FULL_MASK, Rows, Shard, TextShard, has_text, stamp_of, text_path

COMMAND = "run python -m trainers.cache with the same config"
VERSION = "2"
OPEN_FILES = 128
"""Shards that are open at a time."""

NOWHERE = -1
"""Offset of a tensor that the cache does not have."""

TEXT = ("embeds", "uncond", "embeds_scale", "uncond_scale")
Arrays = dict[str, np.ndarray]
Stamps = dict[Path, tuple[int, int] | None]


def index_path(folder: Path, text: str | None) -> Path:
    return folder / f"index-{text or 'vision'}.safetensors"


def open_index(folder: Path, shards: Sequence[Path], text: str | None) -> CachedSamples:
    """The samples of these shards with embeddings by the encoder `text`. Builds the index if it is not current."""
    path, stamps = index_path(folder, text), stamps_of(shards, text)
    state = state_of(stamps)
    made = read_index(path, state)
    if made is None:
        arrays, metadata = build_index(shards, text)
        with suppress(CheckpointError, OSError), replacing(path) as partial:  # a folder that cannot be written
            save_file(arrays, partial, {**metadata, "state": state, "version": VERSION})
        made = arrays, metadata
    return CachedSamples(shards, text, *made, stamps)


def read_index(path: Path, state: str) -> tuple[Arrays, dict[str, str]] | None:
    """The stored arrays, or None if they are not of these shards."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
            if (metadata.get("version"), metadata.get("state")) != (VERSION, state):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None


def stamps_of(shards: Sequence[Path], text: str | None) -> Stamps:
    """Size and time of every file; None for one that is missing."""
    stamps: Stamps = {}
    for path in files_of(shards, text):
        try:
            stamps[path] = stamp_of(path)
        except FileNotFoundError:
            stamps[path] = None
    return stamps


def state_of(stamps: Stamps) -> str:
    """Digest of the names, sizes and times of the files."""
    digest = hashlib.sha256()
    for path, stamp in stamps.items():
        if stamp is None:
            return "incomplete"
        digest.update(f"{path.name} {stamp[0]} {stamp[1]}\n".encode())
    return digest.hexdigest()


def files_of(shards: Iterable[Path], text: str | None) -> Iterator[Path]:
    for path in shards:
        yield path
        if text is not None:
            yield text_path(path, text)


# --- building ---------------------------------------------------------------------------------------------------------


def build_index(shards: Sequence[Path], text: str | None) -> tuple[Arrays, dict[str, str]]:
    """Read the header of every shard once."""
    parts: dict[str, list[dict[str, list[int]]]] = defaultdict(list)
    prompts: dict[str, list[str]] = defaultdict(list)
    contents = hashlib.sha256()
    for number, path in enumerate(tqdm(shards, unit=" shards", desc="index", leave=False)):
        shard = Shard(path)
        if text is None and not shard.has_vision:
            raise ConfigError(f"{path} holds no pictures for training a text encoder; {COMMAND}")
        if text is not None and not has_text(shard, text):
            raise ConfigError(f"{path} has no text embeddings of this encoder; {COMMAND}")
        words = None if text is None else TextShard(text_path(path, text))
        contents.update(json.dumps([shard.text_digest, shard.metadata.get("rows", "")]).encode())
        for shapes, texts in shard.prompts.items():
            parts[shapes].append(part_of(number, shapes, shard, words))
            prompts[shapes] += texts
    if not parts:
        raise ConfigError(f"{shards[0].parent} holds no samples; see its report.json")
    buckets = sorted(parts)
    columns: dict[str, list[int]] = defaultdict(list)
    for bucket, shapes in enumerate(buckets):
        for part in parts[shapes]:
            columns["bucket"].append(bucket)
            for name, values in part.items():
                columns[name] += values
    arrays = {name: np.array(values, dtype=np.int64) for name, values in columns.items()}
    words_of = [prompt for shapes in buckets for prompt in prompts[shapes]]
    blob = [prompt.encode() for prompt in words_of]
    arrays["prompt_bytes"] = np.frombuffer(b"".join(blob), dtype=np.uint8)
    arrays["prompt_ends"] = np.cumsum([0, *map(len, blob)])
    arrays["digests"] = digests_of((shapes, prompt) for shapes in buckets for prompt in prompts[shapes])
    return arrays, {"buckets": json.dumps(buckets), "contents": contents.hexdigest()[:16]}


def part_of(number: int, shapes: str, shard: Shard, text: TextShard | None) -> dict[str, list[int]]:
    """One value, or one per reference or sample, of each column."""
    target, references = shard.table[f"{shapes}/target"], range(shapes.count("_"))
    columns = {"shard": [number], "rows": [target.shape[0]], "channels": [target.shape[1]]}
    columns |= {"target": [target.offset], "height": [target.shape[2]], "width": [target.shape[3]]}
    columns |= {"references": [len(references)]}
    mask = shard.table.get(f"{shapes}/mask")
    columns |= {"mask": [NOWHERE if mask is None else mask.offset]}
    columns |= {"masked": [shard.metadata.get("masks", {}).get(shapes, 0)]}
    pictures = [shard.table[f"{shapes}/reference_{j}"] for j in references]
    columns |= {"reference": [p.offset for p in pictures]}
    columns |= {"reference_height": [p.shape[2] for p in pictures], "reference_width": [p.shape[3] for p in pictures]}
    seen = [shard.table.get(f"{shapes}/vision_{j}") for j in references]
    columns |= {"vision": [NOWHERE if v is None else v.offset for v in seen]}
    columns |= {"vision_height": [0 if v is None else v.shape[1] for v in seen]}
    columns |= {"vision_width": [0 if v is None else v.shape[2] for v in seen]}
    if text is None:
        return columns | {"tokens": [0] * target.shape[0]}
    for name in TEXT:
        spec = text.table.get(f"{shapes}/{name}")
        columns[name] = [NOWHERE if spec is None else spec.offset]
    uncond = text.table[f"{shapes}/uncond"]
    columns |= {"uncond_tokens": [uncond.shape[1]], "text_width": [uncond.shape[2]], "shared": [text.shared[shapes]]}
    return columns | {"tokens": list(text.lengths[shapes])}


def digests_of(rows: Iterable[tuple[str, str]]) -> np.ndarray:
    """uint64 per row from its shapes and prompt; rows that are equal in both are told apart by their order."""
    seen: Counter[tuple[str, str]] = Counter()
    digests = []
    for key in rows:
        text = f"{key[0]}\0{seen[key]}\0{key[1]}"
        digests.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
        seen[key] += 1
    return np.array(digests, dtype=np.uint64)


# --- reading ----------------------------------------------------------------------------------------------------------


class CachedSamples:
    """All samples of a cache as rows 0 .. len - 1. contents: digest of what they were made from.

    stamps: of the files that were indexed; one that is another when it is opened is not read.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        text: str | None,
        arrays: Arrays,
        metadata: dict[str, str],
        stamps: Stamps | None = None,
    ) -> None:
        self.shards, self.text, self.arrays = list(shards), text, arrays
        self.stamps = stamps_of(shards, text) if stamps is None else stamps
        self.contents = metadata["contents"]
        self.buckets: list[str] = json.loads(metadata["buckets"])
        self.part_starts = np.cumsum([0, *arrays["rows"]])
        self.reference_starts = np.cumsum([0, *arrays["references"]])
        self.digests = arrays["digests"]
        part = np.repeat(np.arange(len(arrays["rows"])), arrays["rows"])
        text_ends = np.cumsum(np.concatenate([[0], arrays["tokens"]]))
        self.text_starts = text_ends[:-1] - text_ends[self.part_starts[:-1]][part]
        self.lengths = Lengths(self._target_tokens()[part], self._picture_tokens()[part], arrays["tokens"])
        self._file = lru_cache(maxsize=OPEN_FILES)(self._opened)
        self._lock = Lock()  # a batch is read beside the training, previews within it

    def __len__(self) -> int:
        return int(self.part_starts[-1])

    def _target_tokens(self) -> np.ndarray:
        return self.arrays["height"] * self.arrays["width"] // PATCH**2

    def _picture_tokens(self) -> np.ndarray:
        """Per part, of the target and all references."""
        areas = self.arrays["reference_height"] * self.arrays["reference_width"] // PATCH**2
        before = np.concatenate([[0], np.cumsum(areas)])
        return self._target_tokens() + before[self.reference_starts[1:]] - before[self.reference_starts[:-1]]

    @property
    def num_references(self) -> np.ndarray:
        """Of every row, int64."""
        return np.repeat(self.arrays["references"], self.arrays["rows"])

    @property
    def num_masked(self) -> int:
        """Number of rows with a mask."""
        return int(self.arrays["masked"].sum())

    def first_row(self, shapes: str) -> int:
        """Number of the first row with these shapes; the others follow it."""
        first_part = np.searchsorted(self.arrays["bucket"], self.buckets.index(shapes))
        return int(self.part_starts[first_part])

    def prompt(self, row: int) -> str:
        start, end = self.arrays["prompt_ends"][row : row + 2]
        return bytes(self.arrays["prompt_bytes"][start:end]).decode()

    def take(self, row: int) -> Rows:
        """Read one sample as a batch of one."""
        if not 0 <= row < len(self):
            raise IndexError(f"expected a sample from 0 to {len(self) - 1}, got {row}")
        part = int(np.searchsorted(self.part_starts, row, side="right")) - 1
        i, value = row - int(self.part_starts[part]), {k: int(v[part]) for k, v in self.arrays.items() if k in PER_PART}
        shard, channels = self.shards[value["shard"]], value["channels"]
        size = (channels, value["height"], value["width"])
        target = self._read(shard, value["target"], i, size, torch.bfloat16)
        references, vision = [], []
        for j in range(*self.reference_starts[part : part + 2].tolist()):
            place = {k: int(self.arrays[k][j]) for k in PER_REFERENCE}
            size = (channels, place["reference_height"], place["reference_width"])
            references.append(self._read(shard, place["reference"], i, size, torch.bfloat16))
            if self.text is None:
                size = (place["vision_height"], place["vision_width"], 3)
                vision.append(self._read(shard, place["vision"], i, size, torch.uint8))
        cond, uncond = (None, None) if self.text is None else self._text(row, i, value)
        mask = None if value["mask"] == NOWHERE else self._mask(shard, i, value)
        pictures = tuple(r.float() for r in references)
        return Rows(target.float(), pictures, tuple(vision), (self.prompt(row),), cond, uncond, mask)

    def _mask(self, shard: Path, i: int, value: dict[str, int]) -> Tensor:
        size = (value["height"] // PATCH, value["width"] // PATCH)
        return self._read(shard, value["mask"], i, size, torch.uint8).float() / FULL_MASK

    def _text(self, row: int, i: int, value: dict[str, int]) -> tuple[TextCond, TextCond]:
        """The row's embeddings with its prompt and with " "."""
        assert self.text is not None  # asked by `take`
        path, width = text_path(self.shards[value["shard"]], self.text), value["text_width"]
        start, count = int(self.text_starts[row]), int(self.arrays["tokens"][row])
        cond = self._embeddings(path, value, "embeds", start, count, width)
        own = self._embeddings(path, value, "uncond", i * value["uncond_tokens"], value["uncond_tokens"], width)
        return TextCond(cond[None]), TextCond(torch.cat([cond[: value["shared"]], own])[None])

    def _embeddings(self, path: Path, value: dict[str, int], name: str, start: int, count: int, width: int) -> Tensor:
        """float32 [count, width] from token `start` of a stored tensor [tokens, width]."""
        if value[f"{name}_scale"] == NOWHERE:
            return self._read(path, value[name], start, (width,), torch.bfloat16, count).float()
        stored = self._read(path, value[name], start, (width,), torch.float8_e4m3fn, count)
        return stored.float() * self._read(path, value[f"{name}_scale"], start, (1,), torch.float32, count)

    def _read(
        self, path: Path, offset: int, first: int, size: tuple[int, ...], dtype: torch.dtype, count: int = 1
    ) -> Tensor:
        """Rows first .. first + count - 1 of a stored tensor [n, *size]."""
        each = prod(size) * dtype.itemsize
        with self._lock:
            file = self._file(path)
            file.seek(offset + first * each)
            content = bytearray(file.read(count * each))
        if len(content) < count * each:
            raise CheckpointError(f"{path} is shorter than when it was indexed; run python -m trainers.cache again")
        if not content:
            return torch.empty(count, *size, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype).reshape(count, *size)

    def _opened(self, path: Path) -> BinaryIO:
        """A file that stays open: one that is replaced meanwhile goes on to give what was indexed."""
        file = path.open("rb")
        if stamp_of(file.fileno()) != self.stamps[path]:
            file.close()
            raise CheckpointError(
                f"{path} was written again since this run began, so its rows may lie elsewhere in it; let "
                "trainers.cache end, and run the same command again"
            )
        return file


PER_REFERENCE = (
    *("reference", "reference_height", "reference_width"),
    *("vision", "vision_height", "vision_width"),
)
PER_PART = frozenset(
    {"shard", "channels", "target", "mask", "height", "width", "uncond_tokens", "text_width", "shared", *TEXT}
)
