"""`python -m tests.benchmarks.cache_storage [--model PATH] [--lora FILE] [--form FORM] [--n N] [--json FILE]`

Cost in quality of int8 storage of the condition cache over held-out compositions: the relative error of the keys and
values, and PSNR and latents of the pictures against those of the cache as computed, beside the PSNR of two seeds.
Weights that were trained in full attention run as if they had been trained in FORM: their keys and values are as large.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.nano.render import Sample
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.model.config import FULL, PREFIX_CAUSAL, REFERENCE_CAUSAL
from unipic_core.model.mmdit import MMDiT
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.kv_storage import AUTO, INT8, CacheStorage, StoredTensor

from .approximate import Run, psnr, run_all, samples_of
from .common import RESULTS, changed_options, device_name, machine, write_json


def error(x: Tensor, stored: StoredTensor) -> float:
    return float((stored.restored() - x).norm() / x.norm())


def errors_of(pipe: UniPicPipeline, samples: Sequence[Sample]) -> dict[str, float]:
    """Median relative error of int8 keys and values, over samples and blocks, of references and text."""
    network: MMDiT = pipe.transformer
    found: dict[str, list[float]] = {}
    original = network.prefill

    def watched(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("store", None)
        cache = original(*args, **kwargs)
        piece = list(cache)[-1]
        for kv in cache[piece]:
            for name, x in zip(("keys", "values"), kv, strict=True):
                stored = StoredTensor.of(x, x.device, int8=True)
                found.setdefault(f"{name} of {piece}", []).append(error(x, stored))
        return cache

    network.prefill = watched  # type: ignore[method-assign]
    try:
        run_all(pipe, samples, 1)
    finally:
        network.prefill = original  # type: ignore[method-assign]
    pipe.clear_cache()
    return {name: statistics.median(values) for name, values in found.items()}


def runs(pipe: UniPicPipeline, samples: Sequence[Sample]) -> Iterator[tuple[str, Run]]:
    """All samples as computed, in int8, and as computed with other seeds."""
    for name, dtype, seed in (("exact", AUTO, 0), (INT8, INT8, 0), ("other seeds", AUTO, 100_000)):
        pipe.clear_cache()
        pipe.cache_storage = CacheStorage(AUTO, dtype)
        yield name, run_all(pipe, samples, None, seed)


def measure(pipe: UniPicPipeline, samples: Sequence[Sample]) -> dict[str, Any]:
    errors = errors_of(pipe, samples)
    made = dict(runs(pipe, samples))
    off = (made[INT8].latents - made["exact"].latents).norm(dim=1) / made["exact"].latents.norm(dim=1)
    return {
        "n": len(samples),
        "relative_error": errors,
        "latents": float(off.median()),
        "psnr_db": psnr(made["exact"], made[INT8]),
        "psnr_db_of_two_seeds": psnr(made["exact"], made["other seeds"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--form", default=PREFIX_CAUSAL, choices=(REFERENCE_CAUSAL, PREFIX_CAUSAL))
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(parser=parser)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="no pictures given")
    pipe = UniPicPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device="cpu")
    if args.lora:
        pipe.load_lora(args.lora)
    if pipe.transformer.config.attention_form == FULL:
        pipe.transformer.config = pipe.transformer.config.with_attention_form(args.form)
    result = measure(pipe, samples_of(pipe, args.n))
    for name, value in {**result.pop("relative_error"), **result}.items():
        print(f"{name:24} {value:.4g}")
        result[name] = value
    write_json(
        args.json or RESULTS / f"cache-storage-{device_name()}{changed_options(args)}.json", {**machine(), **result}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
