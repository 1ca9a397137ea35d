"""Hours of 1,000 steps on a GPU, from operations: an estimate to plan with, printed by `python -m trainers.memory`.

A multiplication with an addition is two operations. A forward pass of n tokens through a layer of width w is 24 n w^2
for the matrices and 4 n^2 w for attention. The backward pass costs the matrices once more under adapters (the inputs'
gradients), twice where all weights train, and attention 2.5 times; gradient checkpointing adds a forward pass. A card
reaches UTILISATION of its peak. What is not in it: transfers of swapped or sharded weights, restoring fp8 and nf4,
padding, the text encoder that trains along, previews and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from unipic_core.model.config import MMDiTConfig

from ..config.run import ConfigError, RunConfig, required

STEPS = 1000


@dataclass(frozen=True)
class Card:
    """Dense peak rates of the data sheet, operations per second: bfloat16 products, and float32 without TF32."""

    name: str
    bf16: float
    fp32: float


CARDS = (Card("H100", 989e12, 67e12), Card("A100", 312e12, 19.5e12))
"""SXM modules."""

UTILISATION = {"bf16": 0.4, "no": 0.6}
"""Share of the peak that is reached, by precision: assumed, as usual for large matrices."""

LAUNCH = 0.4e-3
"""Least seconds of one block's forward pass, some 80 kernels: assumed. It decides for small networks alone."""


@dataclass(frozen=True)
class Passes:
    """Evaluations of the network for one sample, by precision of their products.

    forward: without gradient; backward: forward and backward passes; float32: forward passes without autocast.
    """

    forward: float
    backward: float
    float32: float = 0.0


def passes_of(config: RunConfig) -> Passes:
    """Those of one sample in one step, mean over the lengths of rollouts. ConfigError for method vae."""
    if config.network is None:
        raise ConfigError(f"hours are computed for methods that train the network, got method {config.method}")
    forward, backward, float32 = 0.0, 1.0, 0.0
    if (tuning := config.consistency) is not None:
        float32 = (
            2.0 if tuning.tangent == "difference" else 3.0
        )  # the product with the Jacobian: a forward and two more
        if tuning.needs_teacher or tuning.guidance != 1:
            forward += 2 if tuning.guidance != 1 else 1
    if (matching := config.dmd) is not None:
        rollout = (matching.max_steps + 1) / 2
        forward += matching.fake_updates * rollout + (rollout - 1)
        forward += 1 + (2 if matching.teacher_guidance != 1 else 1)  # the fake score and the teacher
        backward = matching.fake_updates + (2 if tuning is not None else 1)
    return Passes(forward, backward, float32)


def forward_operations(sizes: MMDiTConfig, tokens: int) -> tuple[float, float]:
    """Of one evaluation of one sample: in the matrices of the blocks, and in attention."""
    width, layers = sizes.width, sizes.num_layers
    return 24.0 * tokens * width**2 * layers, 4.0 * tokens**2 * width * layers


def hours(config: RunConfig, sizes: MMDiTConfig, tokens: int, card: Card, processes: int = 1) -> float:
    """Of STEPS steps on so many cards. tokens: of one sample, text included."""
    passes, network = passes_of(config), required(config.network)
    matrices, attention = forward_operations(sizes, tokens)
    recomputed = 1.0 if network.gradient_checkpointing else 0.0
    trained = 1.0 if network.adapter is not None else 2.0
    backward = (1 + recomputed + trained) * matrices + (1 + recomputed + 2.5) * attention
    batch = config.batch_size / processes
    usual, least = rate(card, config.precision), LAUNCH * sizes.num_layers
    once = [
        (passes.forward, (matrices + attention) / usual, 1.0),
        (passes.backward, backward / usual, 2.0 + recomputed),
        (passes.float32, (matrices + attention) / rate(card, "no"), 1.0),
    ]
    seconds = sum(count * max(batch * seconds, least * launches) for count, seconds, launches in once)
    return STEPS * config.accumulation * seconds / 3600


def rate(card: Card, precision: str) -> float:
    """Operations per second that are reached."""
    return UTILISATION[precision] * (card.bf16 if precision == "bf16" else card.fp32)


def summary(config: RunConfig, sizes: MMDiTConfig, tokens: int, processes: int = 1) -> str:
    """The line that the configs repeat."""
    times = ", ".join(f"{card.name} {hours(config, sizes, tokens, card, processes):.3g} h" for card in CARDS)
    return f"time of {STEPS:,} steps: {times}"
