"""`python -m trainers.memory CONFIG [key=value ...] [--processes N] [--gib N]`: memory and hours of a run.

Computed from shapes alone: nothing is loaded, and the model's folder need not be there (then the released sizes are
taken). What is stored is counted tensor by tensor, as the trainers hold it. Activations are `Activations` below times
tokens times channels; the allocator's fragmentation comes on top, for which OUTSIDE leaves some room.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import torch

from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from unipic_core.weights.transformer import (
    NETWORK_CLASS,
    class_name,
    config_from_file,
    expected_shapes,
    read_config,
)

from ..config.methods import OptimizerConfig
from ..config.run import AdapterConfig, ConfigError, NetworkConfig, RunConfig, load_config, required
from ..loop.optimizers import is_hidden_matrix
from ..roles.frozen import empty_storage, storage_dtype_of
from ..roles.roles import targets_of
from ..roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER, roles_of
from .hours import summary

Shapes = Mapping[str, tuple[int, ...]]

GIB = 2**30
OUTSIDE = 1.0 * GIB
"""The CUDA context, cuBLAS' workspaces and fragmentation; an assumption."""

PROMPT_TOKENS = 128
"""Text tokens beside those of the references; most prompts are shorter."""

VISION_PIXELS = 32
"""A token of the vision encoder stands for so many pixels each way of a reference (28 of 28/32 of its side)."""

SMALL_STATE = 4096
"""bitsandbytes keeps the states of tensors with fewer numbers in 32 bits."""


@dataclass(frozen=True)
class Activations:
    """Bytes per token and channel of the width.

    boundary: what gradient checkpointing keeps between two blocks. saved: what one block keeps for its backward pass,
    with adapters or (full) for the gradients of all its weights. extra: what its backward pass needs beside that.
    forward: what a forward without gradient needs, once. Counted with fake tensors (tests/trainers/tools/fakes.py).
    """

    boundary: int
    saved: int
    full: int
    extra: int
    forward: int


ACTIVATIONS = {"bf16": Activations(2, 51, 69, 34, 44), "no": Activations(4, 73, 73, 19, 62)}
"""By precision."""


@dataclass(frozen=True)
class Scores:
    """Bytes per score of attention, of which each head has one for every pair of tokens, where they are written out.

    Fused kernels write none. `matmul` does, and forward-mode differentiation always, with the tangents of all steps
    from the product to the softmax. Fields as in Activations.
    """

    saved: int = 6
    extra: int = 10
    forward: int = 8
    jvp: int = 22


SCORES = Scores()


@dataclass(frozen=True)
class Row:
    """A part of what a run holds, in bytes: on each GPU, and in the main memory."""

    what: str
    gpu: float
    main: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """held: at all times. moments: what else is there at some time, of which the largest counts. loading: bytes of
    main memory of each process before anything is on a GPU."""

    held: tuple[Row, ...]
    moments: tuple[Row, ...]
    loading: float

    @property
    def gpu(self) -> float:
        """Bytes of each GPU."""
        return sum(row.gpu for row in self.held) + max(row.gpu for row in self.moments) + OUTSIDE

    @property
    def main(self) -> float:
        """Bytes of main memory of each process: while loading or while training, whichever is more."""
        return max(self.loading, sum(row.main for row in self.held))


def sizes_of(network: NetworkConfig) -> MMDiTConfig:
    """Sizes of the network that a config names; the released ones where there is no such file or folder."""
    path = Path(network.transformer or network.model)
    if path.is_file():
        return read_config(path)
    for folder in (*(path / name for name in TRANSFORMER_FOLDERS), path):
        if class_name(folder / "config.json") == NETWORK_CLASS:
            return config_from_file(folder / "config.json")
    return MMDiTConfig()


@lru_cache(maxsize=8)
def shapes_of(sizes: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network."""
    return expected_shapes(sizes)


def count(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def block_of(name: str) -> int | None:
    """Which block a parameter belongs to."""
    found = re.match(r"transformer_blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def tokens(config: RunConfig) -> int:
    """Tokens of one sample: target, references and text."""
    data = required(config.data)
    images = (data.size // PIXELS_PER_TOKEN) ** 2 + (data.reference_budget // PIXELS_PER_TOKEN) ** 2
    return images + (data.reference_budget // VISION_PIXELS) ** 2 + PROMPT_TOKENS


# --- what is held -----------------------------------------------------------------------------------------------------


def stored_base(shapes: Shapes, kind: str, layers: int, block_swap: int = 0) -> Row:
    """The frozen base in its stored form; block_swap of its last blocks in the main memory."""
    gpu = main = 0
    for name, shape in shapes.items():
        block = block_of(name)
        if len(shape) == 2 and name.endswith(".weight") and "embedding" not in name:
            weight, scale = empty_storage((shape[0], shape[1]), storage_dtype_of(name, shape, kind))
            stored = [weight.nbytes] if scale is None else [weight.nbytes, scale.nbytes]
            if block is not None and block >= layers - block_swap:
                main += sum(pinned(n) for n in stored)
            else:
                gpu += sum(stored)
        else:  # norms and biases are float32 and stay on the GPU
            gpu += 4 * prod(shape)
    return Row(f"frozen base, {kind}", gpu, main)


def pinned(nbytes: int) -> int:
    """torch rounds pinned memory up to a power of two."""
    return 1 << max(nbytes - 1, 0).bit_length()


def adapter_shapes(shapes: Shapes, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of one role's LoRA."""
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and re.fullmatch(targets_of(adapter), layer):
            made[f"{layer}.lora_A.weight"] = (adapter.rank, shape[1])
            made[f"{layer}.lora_B.weight"] = (shape[0], adapter.rank)
    return made


def state_bytes(shapes: Shapes, config: OptimizerConfig) -> float:
    """Bytes that the optimizers keep for these tensors, float32 unless they are adamw8bit's."""
    total = 0.0
    for name, shape in shapes.items():
        numbers = prod(shape)
        if config.muon_lr and is_hidden_matrix(name, torch.empty(shape, device="meta")):
            total += 4 * numbers
        elif config.kind == "adamw8bit" and numbers >= SMALL_STATE:
            total += 2 * numbers + 2 * 4 * numbers / 256  # a scale for each 256
        else:
            total += 8 * numbers
    return total


def activation_bytes(config: RunConfig, sizes: MMDiTConfig, processes: int = 1) -> tuple[float, float]:
    """(what waits for a backward pass, what the pass of one block needs), for one process's share of a batch."""
    network, per = required(config.network), ACTIVATIONS[config.precision]
    unit = config.batch_size / processes * tokens(config) * sizes.width
    saved = per.full if network.adapter is None else per.saved
    scores = score_count(config, sizes, processes) if network.attention == "matmul" else 0
    block, extra = saved * unit + SCORES.saved * scores, per.extra * unit + SCORES.extra * scores
    graphs = 2 if config.method == "joint" else 1  # of both losses, until their sum goes back
    if network.gradient_checkpointing:
        return graphs * per.boundary * sizes.num_layers * unit, block + extra
    return graphs * sizes.num_layers * block, extra


def score_count(config: RunConfig, sizes: MMDiTConfig, processes: int) -> float:
    """Scores of one block, for one process's share of a batch."""
    return config.batch_size / processes * sizes.num_attention_heads * tokens(config) ** 2


def moments(config: RunConfig, sizes: MMDiTConfig, shapes: Shapes, trained: float, processes: int) -> tuple[Row, ...]:
    """The times at which most memory may be in use. trained: bytes of the student's parameters on each GPU."""
    network = required(config.network)
    waiting, working = activation_bytes(config, sizes, processes)
    # while the gradients of one pass come, what waits for it goes; those of the passes before are there from the start
    backward = waiting + trained if config.accumulation > 1 else max(waiting, trained)
    layer = max(prod(shape) for shape in shapes.values())
    if network.adapter is not None:
        copies = 0 if network.weights == ("fp32" if config.precision == "no" else "bf16") else 4 * layer
    else:
        block = count({n: s for n, s in shapes.items() if block_of(n) == 0})
        # the weights that autocast has cast, and sharded ones whole: this block's, the next one's, and a gradient
        casts = 2 * block * (1 if network.gradient_checkpointing else sizes.num_layers)
        copies = (casts if config.precision == "bf16" else 0) + (3 * 4 * block if network.shard else 0)
    made = [
        Row("backward: activations, gradients, restored weights", backward + working + copies),
        Row(
            "update: gradients, the optimizer's temporaries",
            trained * (1 if config.optimizer.kind == "adamw8bit" else 2),
        ),
    ]
    if config.consistency is not None:
        unit = config.batch_size / processes * tokens(config) * sizes.width
        jvp, matmul = config.consistency.tangent == "jvp", network.attention == "matmul"
        scores = (SCORES.jvp if jvp else SCORES.forward * matmul) * score_count(config, sizes, processes)
        made.append(Row("tangent in float32", ACTIVATIONS["no"].forward * unit * (1 + jvp) + 4 * layer + scores))
    return tuple(made)


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """What each process of a run will need. Raises ConfigError for method vae, which has no such network."""
    if config.network is None:
        raise ConfigError(f"memory is computed for methods that train the network, got method {config.method}")
    if config.sft is not None and config.sft.train_text_encoder:
        raise ConfigError("memory is not computed for a text encoder that trains along; set train_text_encoder: false")
    return estimate_roles(config, *roles_of(config), processes)


def estimate_roles(config: RunConfig, trained: Sequence[str], frozen: Sequence[str], processes: int) -> Estimate:
    """The same for any roles. Sharded networks are divided by the number of processes."""
    network = required(config.network)
    sizes = sizes_of(network)
    shapes = shapes_of(sizes)
    optimizers = {STUDENT: config.optimizer, FAKE_SCORE: config.dmd.optimizer if config.dmd else config.optimizer}
    if network.adapter is not None:
        own = adapter_shapes(shapes, network.adapter)
        base = stored_base(shapes, network.weights, sizes.num_layers, network.block_swap)
        roles = ", ".join((*trained, EMA))
        held = [base, Row(f"adapters of rank {network.adapter.rank}: {roles}", 4 * count(own) * (len(trained) + 1))]
        part, loading = 1, stored_base(shapes, network.weights, sizes.num_layers).gpu
    else:
        own, part = dict(shapes), processes if network.shard else 1
        weights = {role: weight_bytes(role, network) * count(own) for role in (*trained, EMA, *frozen)}
        held = [Row(f"network of {role}", nbytes / part) for role, nbytes in weights.items()]
        loading = sum(weights.values())
    for role in trained:
        held.append(Row(f"optimizer states of {role}", state_bytes(own, optimizers[role]) / part))
    return Estimate(tuple(held), moments(config, sizes, shapes, 4 * count(own) / part, processes), loading)


def weight_bytes(role: str, network: NetworkConfig) -> int:
    """Per parameter of a network of its own."""
    return 2 if role == TEACHER and network.weights == "bf16" else 4


def four_copies(config: RunConfig) -> Estimate:
    """The same step with a network for each of student, fake score, teacher and EMA on one machine, as the release
    has it (which spreads them over a cluster)."""
    network = replace(required(config.network), adapter=None, weights="bf16", block_swap=0, shard=False)
    return estimate_roles(replace(config, network=network), (STUDENT, FAKE_SCORE), (TEACHER,), 1)


def table(made: Estimate) -> str:
    """Rows of a table, in GiB."""
    rest = [Row("context, fragmentation (assumed)", OUTSIDE), Row("in all", made.gpu, made.main)]
    rows = [*made.held, *(replace(row, what=f"at times: {row.what}") for row in made.moments), *rest]
    lines = [f"{row.what:62} {row.gpu / GIB:8.2f} {row.main / GIB:8.2f}" for row in rows]
    return "\n".join([f"{'GiB':62} {'GPU':>8} {'main':>8}", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.memory", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, default=1, help="GPUs that share the batch, and sharded networks")
    parser.add_argument("--gib", type=float, help="memory of one GPU; the exit status is 1 if the run needs more")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        made = [(stage, estimate(stage, args.processes)) for stage in config.stages or (config,)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return max(show(stage, estimated, args.processes, args.gib) for stage, estimated in made)


def show(config: RunConfig, made: Estimate, processes: int, gib: float | None) -> int:
    """Print what a run or one of its stages needs; 1 if that is more than `gib` of a GPU."""
    if config.stage:
        print(f"stage {config.stage}: {config.steps} steps, at most {tokens(config)} tokens a sample")
    print(table(made))
    print(summary(config, sizes_of(required(config.network)), tokens(config), processes))
    if config.dmd is not None:
        print(f"four networks with all parameters would need {four_copies(config).gpu / GIB:.0f} GiB")
    if gib is not None:
        word = "fits in" if made.gpu <= gib * GIB else "does not fit in"
        print(f"{made.gpu / GIB:.1f} GiB {word} {gib:g} GiB")
    return int(gib is not None and made.gpu > gib * GIB)


if __name__ == "__main__":
    sys.exit(main())
