"""Estimated hours of 1,000 steps on a GPU, from operation counts; printed by `python -m trainers.memory`.

A multiply-add is two operations. A forward pass of n tokens through a layer of width w costs 24 n w^2 for the matrices
and 4 n^2 w for attention. The backward pass costs the matrices once more with adapters (gradients of the inputs), twice
with all weights trained, and attention 2.5 times; gradient checkpointing adds a forward pass. A card reaches
UTILISATION of its peak. Not included: transfers of swapped or sharded weights, dequantisation of fp8 and nf4, padding,
a trained or live text encoder, previews and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from unipic_core.model.config import MMDiTConfig

from ..config.run import ConfigError, RunConfig, required

STEPS = 1000


@dataclass(frozen=True)
class Card:
    """Dense peak rates from the data sheet, operations per second: bfloat16, TF32, and float32 without TF32."""

    name: str
    bf16: float
    tf32: float
    fp32: float


CARDS = (Card("H100", 989e12, 495e12, 67e12), Card("A100", 312e12, 156e12, 19.5e12))
"""SXM modules."""

UTILISATION = {"bf16": 0.4, "tf32": 0.4, "no": 0.6}
"""Assumed share of the peak that is reached, by precision; usual for large matrices."""

LAUNCH = 0.4e-3
"""Assumed minimum seconds of a block's forward pass, about 80 kernel launches; matters for small networks only."""


@dataclass(frozen=True)
class Passes:
    """Network evaluations per sample and step.

    forward: without gradient; backward: forward and backward passes; float32: forward passes without autocast.
    """

    forward: float
    backward: float
    float32: float = 0.0


def passes_of(config: RunConfig) -> Passes:
    """Count evaluations per sample and step, averaged over rollout lengths. Raises ConfigError for method vae."""
    if config.network is None:
        raise ConfigError(f"hours are computed for methods that train the network, got method {config.method}")
    forward, backward, float32 = 0.0, 1.0, 0.0
    if (tuning := config.consistency) is not None:
        float32 = 2.0 if tuning.tangent == "difference" else 3.0  # jvp: a forward pass and two more
        if tuning.needs_teacher or tuning.guidance != 1:
            forward += 2 if tuning.guidance != 1 else 1
    if (matching := config.dmd) is not None:
        rollout = (matching.max_steps + 1) / 2
        forward += matching.fake_updates * rollout + (rollout - 1)
        forward += 1 + (2 if matching.teacher_guidance != 1 else 1)  # the fake score and the teacher
        backward = matching.fake_updates + (2 if tuning is not None else 1)
    return Passes(forward, backward, float32)


def forward_operations(sizes: MMDiTConfig, tokens: int) -> tuple[float, float]:
    """Operations of one evaluation of one sample: in the blocks' matrices, and in attention."""
    width, layers = sizes.width, sizes.num_layers
    return 24.0 * tokens * width**2 * layers, 4.0 * tokens**2 * width * layers


def hours(config: RunConfig, sizes: MMDiTConfig, tokens: int, card: Card, processes: int = 1) -> float:
    """Hours of STEPS steps on `processes` cards. tokens: of one sample, text included."""
    passes, network = passes_of(config), required(config.network)
    matrices, attention = forward_operations(sizes, tokens)
    recomputed = 1.0 if network.gradient_checkpointing else 0.0
    trained = 1.0 if network.adapter is not None else 2.0
    backward = (1 + recomputed + trained) * matrices + (1 + recomputed + 2.5) * attention
    batch = config.batch_size / processes
    tangent = "tf32" if config.consistency and config.consistency.tangent_precision == "tf32" else "no"
    operations_per_second, least = rate(card, config.precision), LAUNCH * sizes.num_layers
    kinds = [
        (passes.forward, (matrices + attention) / operations_per_second, 1.0),
        (passes.backward, backward / operations_per_second, 2.0 + recomputed),
        (passes.float32, (matrices + attention) / rate(card, tangent), 1.0),
    ]
    seconds = sum(count * max(batch * seconds, least * launches) for count, seconds, launches in kinds)
    return STEPS * config.accumulation * seconds / 3600


def rate(card: Card, precision: str) -> float:
    """Operations per second that the card reaches."""
    return UTILISATION[precision] * {"bf16": card.bf16, "tf32": card.tf32, "no": card.fp32}[precision]


def summary(config: RunConfig, sizes: MMDiTConfig, tokens: int, processes: int = 1) -> str:
    """One line with the hours on each card."""
    times = ", ".join(f"{card.name} {hours(config, sizes, tokens, card, processes):.3g} h" for card in CARDS)
    return f"time of {STEPS:,} steps: {times}"
