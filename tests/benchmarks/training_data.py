"""`python -m tests.benchmarks.training_data [--json FILE]`: what feeds a training step.

1. Mixed data (11 camera sizes, 1 to 6 references, batches of 4, 16 and 64): rows per second (of processor time) of a
   forward and backward pass of the nano's network at 128 and 256 pixels: at 128 what a pass costs whatever its tokens
   is more than those of a row. Micro-batches of similar length, as the trainers make them, against batches of one exact
   set of shapes (the buckets that they had before) and against one row at a time. A bucket repeats rows where it has
   too few; only different rows count. Padding, and rows that buckets never give, are counted at the released sizes.
2. A cache of 700,000 rows in about 11,000 shards: time and memory of a start, with the check of every file's size and
   time, and time of a batch's order.
3. Block swap with prefetch against copies at each product. The transfer of a block is simulated (a wait) and takes a
   part of the time of its computation, or more.

Ratios are medians over neighbouring runs in one process.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.cache import cached_samples
from trainers.config.run import AdapterConfig, DataConfig, NetworkConfig
from trainers.data.batches import Lengths, RowOrder, micro_batches_of
from trainers.data.rows import target_size
from trainers.data.samples import Samples
from trainers.data.shards import shard_path, text_path, write_shard
from trainers.methods.inputs import Inputs, padded_batch
from trainers.roles.frozen import FrozenLinear
from trainers.roles.load import load_roles
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import STUDENT, Roles
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.reference_sizes import reference_sizes, vision_size
from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN, LatentShape, TextCond, pack_with_references
from unipic_core.model.block_swap import BlockSwap, Copies, Pairs
from unipic_core.model.stored import Stored, StoredLinear

from .common import (
    Columns,
    Times,
    heading,
    in_turns,
    line,
    machine,
    make_parser,
    peak_of_its_own,
    result_file,
    timed,
    write_json,
)

CAMERAS = (
    *((4000, 3000), (3000, 4000), (6000, 4000), (4000, 6000), (1920, 1080), (1080, 1920)),
    *((4032, 3024), (2048, 2048), (5472, 3648), (1080, 1350), (2560, 1080)),
)
"""Sizes of pictures in pixels, of cameras, phones and feeds."""


@dataclass(frozen=True)
class Setup:
    """rows: of mixed data. sizes: of batches. sides: of the squares, in pixels, that timed rows fill. cache_rows,
    shard_rows: of the large cache. passes: of a swap's run."""

    rows: int
    sizes: Sequence[int]
    sides: Sequence[int]
    cache_rows: int
    shard_rows: int
    passes: int


FULL_SIZE = Setup(20_000, (4, 16, 64), (128, 256), 700_000, 64, 2)
TINY = Setup(200, (2,), (128,), 300, 64, 1)

# --- mixed data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixedRow:
    """Sizes of one row in tokens (height, width): target, references; and the tokens of its text."""

    target: tuple[int, int]
    references: tuple[tuple[int, int], ...]
    text: int

    @property
    def shapes(self) -> str:
        return "_".join(f"{w}x{h}" for h, w in (self.target, *self.references))


def mixed_rows(count: int, budget: int, seed: int = 0) -> list[MixedRow]:
    """Rows of random cameras, one to six references and prompts of 10 to 119 tokens, at a budget of budget^2 pixels."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        cameras = [CAMERAS[i] for i in rng.integers(len(CAMERAS), size=1 + rng.integers(1, 7))]
        sizes = reference_sizes(cameras[1:], budget)
        words = sum(w * h // 28**2 for w, h in map(vision_size, sizes)) // 4 + int(rng.integers(10, 120))
        rows.append(MixedRow(in_tokens(target_size(cameras[0], budget)), tuple(map(in_tokens, sizes)), words))
    return rows


def in_tokens(size: tuple[int, int]) -> tuple[int, int]:
    return size[1] // PIXELS_PER_TOKEN, size[0] // PIXELS_PER_TOKEN


def lengths_of(rows: Sequence[MixedRow]) -> Lengths:
    target = [h * w for h, w in (row.target for row in rows)]
    pictures = [n + sum(h * w for h, w in row.references) for n, row in zip(target, rows, strict=True)]
    return Lengths(*(np.array(values) for values in (target, pictures, [row.text for row in rows])))


class Buckets:
    """Batches of one exact set of shapes, as the trainers had them before: each bucket an endless row of permutations.

    In epoch e it gives its batches that end in its e-th permutation; a bucket smaller than a batch fills it with
    repeats.
    """

    def __init__(self, shapes: Sequence[str], batch_size: int) -> None:
        self.batch_size, self.rows = batch_size, {}
        for row, name in enumerate(shapes):
            self.rows.setdefault(name, []).append(row)

    def epoch(self, number: int) -> list[np.ndarray]:
        size, batches = self.batch_size, []
        for name, rows in self.rows.items():
            for b in range(number * len(rows) // size, (number + 1) * len(rows) // size):
                batches.append(np.array([self._row(name, i) for i in range(b * size, (b + 1) * size)]))
        return [batches[i] for i in np.random.default_rng(number).permutation(len(batches))]

    def _row(self, name: str, place: int) -> int:
        rows = self.rows[name]
        order = np.random.default_rng([place // len(rows), rows[0]]).permutation(len(rows))
        return rows[order[place % len(rows)]]


def at_released_sizes(rows: Sequence[MixedRow], size: int, epochs: int = 3) -> dict[str, float]:
    """Padding and repeats of both kinds of batches at 1024 pixels, over at most 200 batches and some epochs."""
    lengths, order, buckets = lengths_of(rows), RowOrder(len(rows), size, 0), Buckets([r.shapes for r in rows], size)
    pieces = [micro_batches_of(order[i], lengths) for i in range(min(200, len(rows) // size))]
    padded = sum(lengths.padded_tokens(piece) for batch in pieces for piece in batch)
    full = sum(int(lengths.total[piece].sum()) for batch in pieces for piece in batch)
    batches = [batch for number in range(epochs) for batch in buckets.epoch(number)]
    seen = np.unique(np.concatenate(batches)) if batches else []
    distinct = [len(np.unique(batch)) / size for batch in batches]
    return {
        "padding_share": 1 - full / padded,
        "micro_batches_per_batch": statistics.mean(map(len, pieces)),
        "never_in_buckets_share": 1 - len(seen) / len(rows),
        "different_rows_share_of_a_bucket_batch": statistics.mean(distinct) if distinct else 0.0,
    }


def example(row: MixedRow, seed: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    shape = LatentShape(1, *row.target)
    x0 = torch.randn(1, shape.num_tokens, 64, generator=g)
    references = [[torch.randn(16, 1, 2 * h, 2 * w, generator=g) for h, w in row.references]]
    text = TextCond(torch.randn(1, row.text // 4 + 1, 128, generator=g))
    return Inputs(x0, pack_with_references(x0, shape, references), text, text, rows=(seed,))


def passes(roles: Roles, batches: Sequence[Inputs]) -> None:
    """Forward and backward pass of each; gradients are dropped."""
    for batch in batches:
        roles(STUDENT, batch.latents, 0.5, batch.cond).square().mean().backward()
    for _, p in roles.trained(STUDENT):
        p.grad = None


def nano_roles(**options: Any) -> AdapterRoles:
    network = NetworkConfig(str(DEFAULT_MODEL), adapter=AdapterConfig(rank=8), **options)
    roles = load_roles(network, (STUDENT,), (), seed=0)
    assert isinstance(roles, AdapterRoles)
    return roles


def mixed_data(rounds: int, setup: Setup) -> Iterator[dict[str, float]]:
    """Per side and batch size: rows per second of the three kinds, and the padding at the released sizes."""
    roles, large = nano_roles(), mixed_rows(setup.rows, 1024)
    counted = {size: at_released_sizes(large, size) for size in setup.sizes}
    for side in setup.sides:
        small = mixed_rows(setup.rows, side)
        for size in setup.sizes:
            yield {"side": side, "batch": size, **of_three_kinds(roles, small, size, rounds), **counted[size]}


def of_three_kinds(roles: AdapterRoles, rows: Sequence[MixedRow], size: int, rounds: int) -> dict[str, float]:
    """Rows per second of a batch in micro-batches, of a bucket's batch, and one by one."""
    batch, buckets = RowOrder(len(rows), size, 0)[0], Buckets([row.shapes for row in rows], size)
    of_bucket = next((b for b in buckets.epoch(0)), np.repeat(batch[:1], size))
    singles = {int(row): example(rows[row], int(row)) for row in {*batch.tolist(), *of_bucket.tolist()}}

    def joined(some: Sequence[int]) -> Inputs:
        return padded_batch([singles[int(row)] for row in some])

    packed = [joined(piece) for piece in micro_batches_of(batch, lengths_of(rows))]
    whole, alone = joined(of_bucket.tolist()), [singles[int(row)] for row in batch]
    runs = {
        "packed": lambda: passes(roles, packed),
        "buckets": lambda: passes(roles, [whole]),
        "one_by_one": lambda: passes(roles, alone),
    }
    times, distinct = in_turns(runs, rounds, clock=time.process_time), len(np.unique(of_bucket))
    tokens, of_packed = real_tokens(whole), sum(map(real_tokens, packed))
    over_buckets = times.ratio("packed", "buckets")
    return {
        "packed_rows_per_second": size / times.median("packed"),
        "bucket_rows_per_second": distinct / times.median("buckets"),
        "single_rows_per_second": size / times.median("one_by_one"),
        "time_over_one_by_one": times.ratio("packed", "one_by_one"),
        "time_per_different_row_over_buckets": over_buckets * distinct / size,
        "time_per_token_over_buckets": over_buckets * tokens / of_packed,
        "tokens_per_row": of_packed / size,
        "padding_share_small": 1 - of_packed / sum(map(all_tokens, packed)),
    }


def real_tokens(batch: Inputs) -> int:
    words = batch.cond.mask.sum() if batch.cond.mask is not None else batch.cond.embeds.shape[:2].numel()
    return sum(sum(s.num_tokens for s in shapes) for shapes in batch.latents.shapes) + int(words)


def all_tokens(batch: Inputs) -> int:
    return len(batch.x0) * (batch.latents.tokens.shape[1] + batch.cond.embeds.shape[1])


# --- a large cache ----------------------------------------------------------------------------------------------------

TEXT_NAME = "0" * 12


def write_large_cache(folder: Path, rows: int, shard_rows: int) -> DataConfig:
    """A cache of tiny latents with one reference and text: two files for every shard_rows rows."""
    data = DataConfig(str(folder), kind="jsonl", path="x", size=64, reference_budget=64, samples_per_shard=shard_rows)
    shapes, empty = "32x32_32x32", torch.zeros(shard_rows, 16, 4, 4, dtype=torch.bfloat16)
    lengths = [3] * shard_rows
    embeds, uncond = (torch.zeros(n, 8, dtype=torch.bfloat16) for n in (3 * shard_rows, shard_rows))
    for i in range(-(-rows // shard_rows)):
        n = min(shard_rows, rows - i * shard_rows)
        path = shard_path(folder, i)
        tensors = {f"{shapes}/target": empty[:n], f"{shapes}/reference_0": empty[:n]}
        prompts = {shapes: [f"row {i * shard_rows + j}" for j in range(n)]}
        write_shard(path, tensors, {"prompts": prompts, "text": f"{i:016x}", "rows": f"{i:016x}"})
        text = {f"{shapes}/embeds": embeds[: 3 * n], f"{shapes}/uncond": uncond[:n, None]}
        write_shard(
            text_path(path, TEXT_NAME),
            text,
            {"of": f"{i:016x}", "lengths": {shapes: lengths[:n]}, "shared": {shapes: 2}},
        )
    record = {"kind": "jsonl", "seed": 0, "path": "x", "images": data.images, "samples": 0, "rows": rows}
    settings = {"size": 64, "reference_budget": 64, "samples_per_shard": shard_rows, "vae": "x"}
    (folder / "set.json").write_text(json.dumps({**record, **settings}), encoding="utf-8")
    return data


def opened(data: DataConfig) -> tuple[Samples, RowOrder]:
    samples = Samples(cached_samples(data, TEXT_NAME))
    return samples, RowOrder(len(samples), 256, 0)


class Opening:
    """A start in a process of its own; what it opens stays until its memory is read."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __call__(self) -> None:
        self.opened = opened(self.data)
        self.batch = self.opened[1][0]
        self.rows = [self.opened[0].take(int(row)) for row in self.batch[:8]]


def large_cache(setup: Setup) -> dict[str, float]:
    """Start from a cache of many shards: the first time, which makes the index, and then with it."""
    with tempfile.TemporaryDirectory() as folder:
        writing = time.perf_counter()
        data = write_large_cache(Path(folder), setup.cache_rows, setup.shard_rows)
        writing = time.perf_counter() - writing
        first = timed(lambda: opened(data))
        again = statistics.median(timed(lambda: opened(data)) for _ in range(3))
        samples, order = opened(data)
        order[0]
        seconds = [timed(lambda i=i: order[i]) for i in range(1, 201)]
        reading = timed(lambda: [samples.take(int(row)) for row in order[1]])
        return {
            "rows": len(samples),
            "files": 2 * len(samples.sets[0].shards),
            "written_seconds": writing,
            "first_start_seconds": first,
            "start_seconds": again,
            "start_peak_bytes": peak_of_its_own(Opening, data),
            "order_milliseconds": 1000 * statistics.median(seconds),
            "read_256_rows_seconds": reading,
        }


# --- block swap -------------------------------------------------------------------------------------------------------


class SimulatedCopies(Copies):
    """Transfers that take a given time of each block and no processor, as a GPU's copy engine does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def copy(self, pairs: Pairs, used: Any) -> None:
        time.sleep(self.seconds)


class InlineCopies:
    """Copies for each product, which wait for them: block swap without prefetch. seconds: of a block."""

    def __init__(self, seconds: float, layers: int) -> None:
        self.seconds = seconds / layers

    def serves(self, layer: StoredLinear, device: torch.device) -> bool:
        return True

    def stored(self, layer: StoredLinear, device: torch.device, returns: bool = False) -> Stored:
        if not returns:  # `FrozenLinear.forward` announces a layer, the product then takes it
            time.sleep(self.seconds)
        return layer.weight, layer.scale

    def release(self) -> None:
        pass


class Prefetching(BlockSwap):
    """The swap with the weights where they are: its rooms stay empty, only its order and waits count."""

    def stored(self, layer: StoredLinear, device: torch.device, returns: bool = False) -> Stored:
        super().stored(layer, device, returns)
        return layer.weight, layer.scale


def block_swap(rounds: int, setup: Setup) -> Iterator[dict[str, float]]:
    """Forward and backward passes with checkpointing, all blocks swapped, for transfers of some times a block's."""
    roles, batch = nano_roles(gradient_checkpointing=True), example(mixed_rows(8, 256)[5], 0)
    blocks = [[m for m in b.modules() if isinstance(m, FrozenLinear)] for b in roles.network.transformer_blocks]
    run = lambda: [passes(roles, [batch]) for _ in range(setup.passes)]  # noqa: E731
    run()
    block_seconds = statistics.median(timed(run) for _ in range(3)) / setup.passes / len(blocks) / 3

    def under(swap: Any) -> Any:
        def with_swap() -> Tensor | None:
            for layer in itertools.chain(*blocks):
                layer.swap = swap
            run()
            return None

        return with_swap

    for share in (0.5, 1.0, 2.0):
        seconds = share * block_seconds
        swaps = {
            "resident": None,
            "prefetching": Prefetching(blocks, SimulatedCopies(seconds)),
            "at_each_product": InlineCopies(seconds, len(blocks[0])),
        }
        times: Times = in_turns({name: under(swap) for name, swap in swaps.items()}, rounds)
        yield {
            "transfer_over_computation": share,
            "prefetching_over_resident": times.ratio("prefetching", "resident"),
            "at_each_product_over_resident": times.ratio("at_each_product", "resident"),
            "prefetching_over_at_each_product": times.ratio("prefetching", "at_each_product"),
        }


# --- what comes out ---------------------------------------------------------------------------------------------------


def columns_of(row: dict[str, Any]) -> Columns:
    return {key: f">{max(len(key), 9)}.4g" for key in row}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser(__doc__, rounds=5).parse_args(argv)
    setup, path = TINY if args.tiny else FULL_SIZE, result_file(args, "training-data")
    result: dict[str, Any] = {"machine": machine()}
    parts = {
        "mixed_data": lambda: mixed_data(args.rounds, setup),
        "large_cache": lambda: iter([large_cache(setup)]),
        "block_swap": lambda: block_swap(args.rounds, setup),
    }
    for name, rows_of in parts.items():
        result[name] = []
        for row in rows_of():
            columns = columns_of(row)
            print(*([] if result[name] else [f"\n{name}", heading(columns)]), line(columns, row), sep="\n", flush=True)
            result[name].append(row)
            write_json(path, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
