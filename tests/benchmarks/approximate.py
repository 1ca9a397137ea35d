"""`python -m tests.benchmarks.approximate [--model PATH] [--lora FILE] [--steps N] [--n N] [--json FILE]`

What an approximate cache costs in quality, on weights of the release's attention form: references see the picture that
is being made, so their keys and values change with every step. Here those of an earlier step are used again, for cond
and uncond apart.

1. Error of a step's velocity (relative, all samples) when it uses the keys and values of each earlier step.
2. The rule: refresh wherever t has moved further than a limit since; the pack's is REUSE_WITHIN.
3. For each limit, against the run that refreshes in every step: PSNR of the pictures and relative error of the
   latents, beside how far the pictures of two seeds lie apart, and the time on the released sizes by arithmetic.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.nano.emoji import Bank, default_folder
from trainers.nano.render import Sample, render
from trainers.nano.scenes import make_scene
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.attention_forms import spans, through_blocks
from unipic_core.model.blocks import KeyValue
from unipic_core.model.config import FULL, REFERENCE_CAUSAL, REFERENCES, MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.pipeline import UniPicPipeline
from unipic_core.run.kv_cache import REUSE_WITHIN
from unipic_core.run.plan import resolve

from .arithmetic import Load, step_flops
from .common import RESULTS, changed_options, device_name, draw, heading, line, machine, write_json

LIMITS = (0.0, 0.1, REUSE_WITHIN, 0.35, 0.5, 1.0)
TOP_DB = 60
"""The best that is drawn: two runs that refresh in every step differ by rounding alone."""

COLUMNS = {"limit": ">6.2f", "refreshed": "<26", "time": ">6.2f", "psnr_db": ">8.1f", "latents": ">8.3f"}
RELEASE = Load(LatentShape(1, 64, 64), (LatentShape(1, 64, 64),), 1070)
"""1024^2 with the shared budget."""

Kept = tuple[KeyValue, ...]


class Reusing:
    """A network of the full form that computes its references' keys and values in some steps alone.

    refreshed: these steps; None = all, and then `errors[i, j]` collects how far a velocity of step j is off with the
    keys and values of step i.
    """

    def __init__(self, network: MMDiT, refreshed: Sequence[int] | None = None) -> None:
        assert network.config.attention_form == FULL
        self.network, self.refreshed = network, refreshed
        self.errors: dict[tuple[int, int], list[float]] = {}
        self.times: list[float] = []
        self._kept: dict[tuple[int, int], Kept] = {}

    def begin(self) -> None:
        """Forget the run before."""
        self.times, self._kept, self._calls = [], {}, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def to(self, device: torch.device | str) -> Reusing:
        self.network.to(device)
        return self

    def __call__(
        self, latents: PackedLatents, t: float, text: TextCond, cache: Any = None, reference_bias: None = None
    ) -> Tensor:
        if not self.times or self.times[-1] != t:
            self.times.append(t)
            self._calls = 0
        step, branch = len(self.times) - 1, self._calls  # the first call of a step is cond, the second uncond
        self._calls += 1
        if self.refreshed is not None and step not in self.refreshed:
            return self.reused(latents, t, text, self._kept[max(s for s, b in self._kept if b == branch), branch])
        v, kept = self.fresh(latents, t, text)
        if self.refreshed is None:
            for (earlier, b), old in self._kept.items():
                if b == branch:
                    off = self.reused(latents, t, text, old) - v
                    self.errors.setdefault((earlier, step), []).append(float(off.norm() / v.norm()))
        self._kept[step, branch] = kept
        return v

    def fresh(self, latents: PackedLatents, t: float, text: TextCond) -> tuple[Tensor, Kept]:
        """The velocity, and the references' keys and values of this step."""
        network, references = self.network, spans(latents, text)[REFERENCES]
        segments, _ = network._segments(latents, t, text, None, {})
        keeping = replace(segments[0], state=replace(segments[0].state, return_kv=True))
        by_block: list[list[KeyValue]] = []
        [done] = through_blocks(network.transformer_blocks, [keeping], collect=by_block.append)
        kept = tuple(kv for (kv,) in by_block)
        v = network.proj_out(network.norm_out(done.img, done.temb))
        return v, tuple((k[:, references.start :], v[:, references.start :]) for k, v in kept)

    def reused(self, latents: PackedLatents, t: float, text: TextCond, kept: Kept) -> Tensor:
        network = self.network
        network.config = network.config.with_attention_form(REFERENCE_CAUSAL)
        try:
            return network(latents, t, text, cache={REFERENCES: kept})
        finally:
            network.config = network.config.with_attention_form(FULL)


@dataclass(frozen=True)
class Run:
    """One way of running all samples."""

    latents: Tensor
    pictures: np.ndarray


def run_all(pipe: UniPicPipeline, samples: Sequence[Sample], steps: int | None, seed: int = 0) -> Run:
    latents, pictures = [], []
    for i, sample in enumerate(samples):
        if isinstance(pipe.transformer, Reusing):
            pipe.transformer.begin()
        size = {"width": sample.target.width, "height": sample.target.height}
        made = pipe(
            images=sample.references,
            prompt=sample.instruction,
            num_inference_steps=steps,
            seed=seed + i,
            output_type="latent",
            **size,
        ).images
        latents.append(made.flatten())
        decoded = pipe._decode(made, LatentShape.of_pixels(*sample.target.size))
        pictures.append(((decoded[0] + 1) / 2).numpy())
    return Run(torch.stack(latents), np.stack(pictures))


def psnr(a: Run, b: Run) -> float:
    """Median over the samples, dB."""
    errors = ((a.pictures - b.pictures) ** 2).mean(axis=(1, 2, 3))
    return float(np.median(-10 * np.log10(np.maximum(errors, 1e-12))))


def choice(times: Sequence[float], limit: float) -> list[int]:
    """The steps to refresh: the first, and each before which t has moved further than the limit."""
    refreshed = [0]
    for step, t in enumerate(times):
        if times[refreshed[-1]] - t > limit:
            refreshed.append(step)
    return refreshed


def relative_time(refreshed: Sequence[int], steps: int) -> float:
    """Of a run on the released sizes, by arithmetic, against one that refreshes in every step."""
    full = step_flops(MMDiTConfig(), RELEASE)
    reused = step_flops(MMDiTConfig(attention_form=REFERENCE_CAUSAL), RELEASE, cached=True)
    return (len(refreshed) * full + (steps - len(refreshed)) * reused) / (steps * full)


# --- measuring --------------------------------------------------------------------------------------------------------


def samples_of(pipe: UniPicPipeline, n: int) -> list[Sample]:
    """The first held-out compositions that have references, of the size that the model was trained for."""
    size = resolve(pipe.recipe).output_budget
    bank = Bank(default_folder(), size)
    scenes = (make_scene(bank, "heldout", 1, i, size=size) for i in range(10 * n))
    return [s for s in (render(bank, scene) for scene in scenes) if s.references][:n]


def measure_errors(pipe: UniPicPipeline, samples: Sequence[Sample], steps: int) -> tuple[Run, dict[str, Any]]:
    """The exact run; its times, and a table [step of the keys and values][step of use] of the velocity's error."""
    network = pipe.transformer
    everywhere = pipe.transformer = Reusing(network)  # type: ignore[assignment]
    exact = run_all(pipe, samples, steps)
    pipe.transformer = network
    medians = {pair: statistics.median(found) for pair, found in everywhere.errors.items()}
    table = [[medians.get((i, j)) for j in range(steps)] for i in range(steps)]
    return exact, {"times": list(everywhere.times), "errors": table}


def measure_limits(
    pipe: UniPicPipeline, samples: Sequence[Sample], exact: Run, times: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """A row for each limit."""
    network, steps = pipe.transformer, len(times)
    for limit in LIMITS:
        refreshed = choice(times, limit)
        pipe.transformer = Reusing(network, refreshed)  # type: ignore[assignment]
        made = run_all(pipe, samples, steps)
        off = (made.latents - exact.latents).norm(dim=1) / exact.latents.norm(dim=1)
        yield {
            "limit": limit,
            "refreshed": ", ".join(map(str, refreshed)),
            "time": relative_time(refreshed, steps),
            "psnr_db": psnr(exact, made),
            "latents": float(off.median()),
        }
    pipe.transformer = network


def measure(pipe: UniPicPipeline, samples: Sequence[Sample], steps: int) -> dict[str, Any]:
    """All figures, printed as they come."""
    exact, result = measure_errors(pipe, samples, steps)
    print("median relative error of the velocity; row: step of the keys and values, column: step of their use")
    for row in result["errors"][:-1]:
        print(" ".join(" " * 6 if error is None else f"{error:6.3f}" for error in row[1:]))
    between = psnr(exact, run_all(pipe, samples, steps, seed=100_000))
    print(f"\npictures of two seeds lie {between:.1f} dB apart\n{heading(COLUMNS)}")
    rows = []
    for row in measure_limits(pipe, samples, exact, result["times"]):
        rows.append(row)
        print(line(COLUMNS, row), flush=True)
    return {"steps": steps, "n": len(samples), **result, "psnr_db_of_two_seeds": between, "rows": rows}


# --- what comes out ---------------------------------------------------------------------------------------------------


PANELS = ("relative error of the velocity", "what refreshing buys")


def plot(result: dict[str, Any], axes: Sequence[Any]) -> None:
    rows, last = result["rows"], result["steps"] - 1
    used = [[math.nan if e is None else e for e in row[1:]] for row in result["errors"][:last]]
    drawn = axes[0].imshow(used, extent=(0.5, last + 0.5, last - 0.5, -0.5))  # a use comes after its making
    axes[0].figure.colorbar(drawn, ax=axes[0])
    axes[0].grid(False)
    axes[0].set(xlabel="step of use", ylabel="step of the keys and values")
    axes[1].plot([r["time"] for r in rows], [min(r["psnr_db"], TOP_DB) for r in rows], "o-")
    axes[1].axhline(result["psnr_db_of_two_seeds"], color="black", linestyle="dotted")
    axes[1].set(
        xlabel="time of a run by arithmetic, of the exact one's",
        ylabel=f"PSNR, dB ({TOP_DB}: or more; dotted: two seeds)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(parser=parser)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="no pictures given")
    pipe = UniPicPipeline.from_pretrained(args.model, torch_dtype=torch.float32, device="cpu")
    if args.lora:
        pipe.load_lora(args.lora)
    result = {**machine(), **measure(pipe, samples_of(pipe, args.n), args.steps)}
    path = args.json or RESULTS / f"approximate-{device_name()}{changed_options(args)}.json"
    write_json(path, result)
    draw(path, PANELS, partial(plot, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
