"""What a training step costs by method, attention form of the student, and kind of roles, on the nano.

A step is what the training loop does between two steps: every update of its parts, with backward pass, clipping,
optimizer and moving average. Tokens are those of the samples that its updates are given, without padding. What stands
beside a figure by arithmetic: of times, operations (counted by torch) at the rate of a large matrix product, timed in
the same rounds; of ratios, operations over operations; of memory, the trainers' own estimate (trainers/memory.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainers.cache import build, load_image_vae
from trainers.config.run import RunConfig, parse_run, required
from trainers.loop.method import MAIN
from trainers.loop.parts import make_parts, update_average
from trainers.methods.inputs import padded_batch
from trainers.tools.memory import OUTSIDE, estimate
from trainers.train import make_method
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.model.config import ATTENTION_FORMS
from unipic_core.pipeline.text_encoder import TextEncoder

from .arithmetic import count_flops
from .common import MIB, Run, peak_of_its_own
from .systems import Kind, rated

METHODS = ("sft", "consistency", "dmd")
ROLES: dict[str, dict[str, Any]] = {"adapters": {"adapter": {"rank": 32}}, "copies": {}}
BATCH = 8
KIND = Kind(torch.float32)
PRODUCT_SIDE = 2048


@dataclass(frozen=True)
class Variant:
    method: str
    form: str
    roles: str

    @property
    def name(self) -> str:
        return f"{self.form} {self.roles}"

    def config(self, folder: str) -> RunConfig:
        """folder: of the cached samples."""
        network = {"model": str(DEFAULT_MODEL), "attention_form": self.form, **ROLES[self.roles]}
        data = {"folder": folder, "samples": BATCH, "samples_per_shard": BATCH, "workers": 0}
        return parse_run(
            {"method": self.method, "output": folder, "batch_size": BATCH, "network": network, "data": data}
        )


def cache_samples(config: RunConfig) -> None:
    """Encode the samples that all variants train on, and those of the grid."""
    text = TextEncoder.from_pretrained(DEFAULT_MODEL, torch.float32)
    build(required(config.data), load_image_vae(DEFAULT_MODEL / "vae"), text, config.preview)


def step_of(variant: Variant, folder: str) -> tuple[Run, int]:
    """A step of the variant, always on the same batch, and its tokens."""
    config = variant.config(folder)
    method = make_method(config)
    parts, averaged, batch = make_parts(config, method), method.averaged(), method.batch(0)
    batch = padded_batch(batch.micro_batches)
    updates = method.updates(0)

    def step() -> None:
        for name in updates:
            losses, _ = method.loss(name, batch)
            losses.mean().backward()
            parts[name].update()
        assert MAIN in updates
        update_average(averaged, config.ema_decay, 0)

    words = batch.cond.embeds.shape[:2].numel() if batch.cond.mask is None else int(batch.cond.mask.sum())
    return step, len(updates) * (sum(batch.latents.lengths) + words)


def import_optimizers() -> None:
    """torch imports a part of itself with the first optimizer, which no benchmark of memory wants to count."""
    torch.optim.AdamW([torch.zeros(1)])


def step_for_memory(variant: Variant, folder: str) -> Run:
    """For a process of its own: build everything and take a step."""
    import_optimizers()
    return lambda: step_of(variant, folder)[0]()


def bytes_by_arithmetic(config: RunConfig) -> float:
    """What a run holds at most, without what a GPU's libraries take."""
    return estimate(config).gpu - OUTSIDE


def method_rows(method: str, folder: str, rounds: int) -> Iterator[dict[str, Any]]:
    """All variants of a method in turns; ratios of time are over the full form with adapters."""
    variants = [Variant(method, form, roles) for roles in ROLES for form in ATTENTION_FORMS]
    steps = {variant.name: step_of(variant, folder) for variant in variants}
    flops = {name: count_flops(step) for name, (step, _) in steps.items()}  # also the round before those that count
    times, per_second = rated({name: step for name, (step, _) in steps.items()}, KIND, PRODUCT_SIDE, rounds, warmup=0)
    first = variants[0].name
    for variant in variants:
        name, tokens = variant.name, steps[variant.name][1]
        yield {
            "method": method,
            "form": variant.form,
            "roles": variant.roles,
            "tokens_per_second": tokens / times.median(name),
            "tokens_per_second_arithmetic": tokens / flops[name] * per_second,
            "time_ratio": times.ratio(name, first),
            "time_ratio_arithmetic": flops[name] / flops[first],
            "peak_mib": peak_of_its_own(step_for_memory, variant, folder) / MIB,
            "peak_mib_arithmetic": bytes_by_arithmetic(variant.config(folder)) / MIB,
        }


def step_rows(rounds: int, methods: Sequence[str] = METHODS) -> Iterator[dict[str, Any]]:
    """The rows of all methods."""
    with tempfile.TemporaryDirectory() as folder:
        cache_samples(Variant("sft", "full", "adapters").config(folder))
        for method in methods:
            yield from method_rows(method, folder, rounds)
