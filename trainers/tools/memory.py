"""`python -m trainers.memory CONFIG [key=value ...] [--processes N] [--gib N]`: memory and hours of a run.

Computed from shapes: nothing is loaded, and the model folder may be missing (then the released sizes are assumed).
Weights and optimizer states are counted tensor by tensor. Activations are `Activations` times tokens times channels;
OUTSIDE leaves room for fragmentation.
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

from unipic_core.conditioning.prompt import PROMPT_TOKENS
from unipic_core.conditioning.reference_sizes import tokens_of_budget
from unipic_core.conditioning.sequence import PIXELS_PER_TOKEN
from unipic_core.model.config import MMDiTConfig
from unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from unipic_core.weights.text_encoder import open_encoder
from unipic_core.weights.transformer import (
    NETWORK_CLASS,
    class_name,
    config_from_file,
    expected_shapes,
    read_config,
)

from ..config.methods import OptimizerConfig
from ..config.run import AdapterConfig, ConfigError, NetworkConfig, RunConfig, load_config, required
from ..optimizers.muon import is_hidden_matrix
from ..roles.adapters import targets_of
from ..roles.frozen import empty_storage, storage_dtype_of
from ..roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER, roles_of
from .hours import summary

Shapes = Mapping[str, tuple[int, ...]]

GIB = 2**30
OUTSIDE = 1.0 * GIB
"""Assumed size of the CUDA context, cuBLAS workspaces and fragmentation."""

SMALL_STATE = 4096
"""bitsandbytes stores the states of smaller tensors in 32 bits."""


RELEASED_ENCODER = 8_292_166_656
"""Parameters of Qwen2.5-VL-7B-Instruct."""


@dataclass(frozen=True)
class Activations:
    """Bytes per token and channel.

    boundary: stored between two blocks by gradient checkpointing. saved: stored by one block for its backward pass,
    with adapters, or (full) for gradients of all its weights. extra: additional need of that backward pass. forward:
    need of a forward pass without gradient. Measured with fake tensors (tests/trainers/tools/fakes.py).
    """

    boundary: int
    saved: int
    full: int
    extra: int
    forward: int


ACTIVATIONS = {"bf16": Activations(2, 51, 69, 34, 44), "no": Activations(4, 73, 73, 19, 62)}
"""Activations by precision."""


@dataclass(frozen=True)
class Scores:
    """Bytes per attention score (one per head and pair of tokens) where scores are stored.

    Fused kernels store none; `matmul` does, and forward-mode differentiation always, with the tangents of all steps
    from the product to the softmax. Fields as in Activations.
    """

    saved: int = 6
    extra: int = 10
    forward: int = 8
    jvp: int = 22


SCORES = Scores()


@dataclass(frozen=True)
class Row:
    """Part of a run's memory in bytes: on each GPU, and in main memory."""

    name: str
    gpu: float
    main: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Memory of a run. held: at all times; moments: additionally at some time, of which the largest counts.

    loading: bytes of main memory per process while loading, before anything is on a GPU.
    """

    held: tuple[Row, ...]
    moments: tuple[Row, ...]
    loading: float

    @property
    def gpu(self) -> float:
        """Bytes on each GPU."""
        return sum(row.gpu for row in self.held) + max(row.gpu for row in self.moments) + OUTSIDE

    @property
    def main(self) -> float:
        """Bytes of main memory per process: the larger of loading and training."""
        return max(self.loading, sum(row.main for row in self.held))


def sizes_of(network: NetworkConfig) -> MMDiTConfig:
    """Sizes of a config's network; the released ones if its file or folder does not exist."""
    path = Path(network.transformer or network.model)
    if path.is_file():
        return read_config(path)
    for folder in (*(path / name for name in TRANSFORMER_FOLDERS), path):
        if class_name(folder / "config.json") == NETWORK_CLASS:
            return config_from_file(folder / "config.json")
    return MMDiTConfig()


@lru_cache(maxsize=8)
def shapes_of(sizes: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the network."""
    return expected_shapes(sizes)


def count(shapes: Shapes) -> int:
    """Number of elements in all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def block_of(name: str) -> int | None:
    """Index of the block of a parameter; None outside the blocks."""
    match = re.match(r"transformer_blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def tokens(config: RunConfig) -> int:
    """Tokens of one sample: target, references and text."""
    data = required(config.data)
    references = tokens_of_budget(data.reference_budget)
    return (data.size // PIXELS_PER_TOKEN) ** 2 + references.image + references.vision + PROMPT_TOKENS


# --- parts of the memory ----------------------------------------------------------------------------------------------


def stored_base(shapes: Shapes, storage_dtype: str, layers: int, block_swap: int = 0) -> Row:
    """Memory of the frozen base in its storage dtype, with the last block_swap blocks in main memory."""
    gpu = main = 0
    for name, shape in shapes.items():
        block = block_of(name)
        if is_matrix(name, shape):
            stored = stored_bytes(name, shape, storage_dtype)
            if block is not None and block >= layers - block_swap:
                main += sum(pinned(n) for n in stored)
            else:
                gpu += sum(stored)
        else:  # norms and biases are float32 and stay on the GPU
            gpu += 4 * prod(shape)
    return Row(f"frozen base, {storage_dtype}", gpu, main)


def swap_rooms(shapes: Shapes, storage_dtype: str, block_swap: int) -> Row:
    """Memory on the GPU for the swapped blocks of the moment: the one that computes and the next."""
    block = [stored_bytes(n, s, storage_dtype) for n, s in shapes.items() if block_of(n) == 0 and is_matrix(n, s)]
    return Row("room for swapped blocks", min(2, block_swap) * sum(map(sum, block)))


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """True for the weight of a linear layer."""
    return len(shape) == 2 and name.endswith(".weight") and "embedding" not in name


def stored_bytes(name: str, shape: tuple[int, ...], storage_dtype: str) -> list[int]:
    """Bytes of the stored weight of a linear layer, and of its scale if it has one."""
    weight, scale = empty_storage((shape[0], shape[1]), storage_dtype_of(name, shape, storage_dtype))
    return [weight.nbytes] if scale is None else [weight.nbytes, scale.nbytes]


def pinned(nbytes: int) -> int:
    """Size of pinned memory, which torch rounds up to a power of two."""
    return 1 << max(nbytes - 1, 0).bit_length()


def adapter_shapes(shapes: Shapes, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one role's LoRA."""
    lora: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if layer != name and re.fullmatch(targets_of(adapter), layer) and not adapter.excludes(layer):
            rank = adapter.rank_of(layer)
            lora[f"{layer}.lora_A.weight"] = (rank, shape[1])
            lora[f"{layer}.lora_B.weight"] = (shape[0], rank)
    return lora


def state_bytes(shapes: Shapes, config: OptimizerConfig) -> float:
    """Bytes of optimizer state of these tensors: float32, except for adamw8bit; two numbers per parameter in AdamW and
    schedule-free AdamW, four in Prodigy, a row and a column per matrix in Adafactor."""
    total = 0.0
    for name, shape in shapes.items():
        numbers = prod(shape)
        if config.muon_lr and is_hidden_matrix(name, torch.empty(shape, device="meta")):
            total += 4 * numbers
        elif config.kind == "adamw8bit" and numbers >= SMALL_STATE:
            total += 2 * numbers + 2 * 4 * numbers / 256  # one scale per 256 numbers
        elif config.kind == "adafactor" and len(shape) > 1:
            total += 4 * numbers * (1 / shape[-1] + 1 / shape[-2])
        else:
            total += {"adafactor": 4, "prodigy": 16}.get(config.kind, 8) * numbers
    return total


def activation_bytes(config: RunConfig, sizes: MMDiTConfig, processes: int = 1) -> tuple[float, float]:
    """Bytes stored until the backward pass, and bytes needed by the pass of one block, for one process's share."""
    network, per = required(config.network), ACTIVATIONS[config.precision]
    unit = micro_batch_tokens(config, processes) * sizes.width
    saved = per.full if network.adapter is None else per.saved
    scores = score_count(config, sizes, processes) if network.attention == "matmul" else 0
    block, extra = saved * unit + SCORES.saved * scores, per.extra * unit + SCORES.extra * scores
    graphs = 2 if config.method == "joint" else 1  # both losses are stored until the backward pass
    if network.gradient_checkpointing:
        return graphs * per.boundary * sizes.num_layers * unit, block + extra
    return graphs * sizes.num_layers * block, extra


def micro_batch_tokens(config: RunConfig, processes: int) -> float:
    """Most tokens that one process computes at once."""
    longest = tokens(config)
    share = config.batch_size / processes * longest
    return min(share, max(config.max_tokens, longest)) if config.max_tokens else share


def score_count(config: RunConfig, sizes: MMDiTConfig, processes: int) -> float:
    """Number of attention scores of one block for one process's share of a batch."""
    return micro_batch_tokens(config, processes) * sizes.num_attention_heads * tokens(config)


def moments(config: RunConfig, sizes: MMDiTConfig, shapes: Shapes, trained: float, processes: int) -> tuple[Row, ...]:
    """Moments of largest memory use. trained: bytes of the student's parameters on each GPU."""
    network = required(config.network)
    waiting, working = activation_bytes(config, sizes, processes)
    # stored activations are freed as gradients are computed; with accumulation earlier gradients exist from the start
    backward = waiting + trained if config.accumulation > 1 else max(waiting, trained)
    layer = max(prod(shape) for shape in shapes.values())
    if network.adapter is not None:
        copies: float = 0 if network.weights == ("fp32" if config.precision == "no" else "bf16") else 4 * layer
        if network.shard:  # gathered: this block and the next one
            copies += swap_rooms(shapes, network.weights, 2).gpu
    else:
        copies = block_copies(config, count({n: s for n, s in shapes.items() if block_of(n) == 0}), sizes.num_layers)
    rows = [
        Row("backward: activations, gradients, dequantised weights", backward + working + copies),
        Row(
            "update: gradients, optimizer temporaries",
            trained * (1 if config.optimizer.kind == "adamw8bit" else 2),
        ),
    ]
    if config.consistency is not None:
        unit = micro_batch_tokens(config, processes) * sizes.width
        jvp, matmul = config.consistency.tangent == "jvp", network.attention == "matmul"
        scores = (SCORES.jvp if jvp else SCORES.forward * matmul) * score_count(config, sizes, processes)
        rows.append(Row("tangent in float32", ACTIVATIONS["no"].forward * unit * (1 + jvp) + 4 * layer + scores))
    return tuple(rows)


def block_copies(config: RunConfig, block: int, layers: int) -> float:
    """Bytes of casts and gathered shards of trained networks. block: parameters of a block."""
    network, half = required(config.network), config.precision == "bf16"
    if not network.shard:
        return 2 * block * (1 if network.gradient_checkpointing else layers) if half else 0
    if half and network.gather != "fp32":  # this block and the next one in bfloat16, a gradient, and it in float32
        return (2 * 2 + 2 + 4) * block
    casts = 2 * block * (1 if network.gradient_checkpointing else layers) if half else 0
    return casts + 3 * 4 * block  # this block, the next one, and a gradient


def estimate(config: RunConfig, processes: int = 1) -> Estimate:
    """Memory per process of a run. Raises ConfigError for method vae and for a trained text encoder."""
    if config.network is None:
        raise ConfigError(f"memory is computed for methods that train the network, got method {config.method}")
    if config.network.adapter is not None and config.network.adapter.type != "lora":
        raise ConfigError(
            f"memory is computed for adapters of type lora, got {config.network.adapter.type}, which holds changes of "
            "whole weights as well"
        )
    if config.sft is not None and config.sft.train_text_encoder:
        raise ConfigError(
            "memory is not computed for a trained text encoder, got sft.train_text_encoder true; set it to false"
        )
    made = estimate_roles(config, *roles_of(config), processes)
    if not config.encodes_live:
        return made
    encoder = Row("text encoder, for live embeddings", 2 * encoder_parameters(Path(config.network.model)))
    return replace(made, held=(*made.held, encoder))


def encoder_parameters(folder: Path) -> int:
    """Parameters of a pipeline folder's text encoder; the released one's if it does not exist."""
    if not (folder / "text_encoder").is_dir():
        return RELEASED_ENCODER
    return count(open_encoder(folder).shapes())


def estimate_roles(config: RunConfig, trained: Sequence[str], frozen: Sequence[str], processes: int) -> Estimate:
    """Memory for given roles; sharded networks are divided by the number of processes that share a copy."""
    network = required(config.network)
    sizes = sizes_of(network)
    shapes = shapes_of(sizes)
    sharers = network.shard_over or processes
    # sharded networks are read tensor by tensor, by the main process alone
    one_tensor = 4 * max(prod(shape) for shape in shapes.values())
    optimizers = {STUDENT: config.optimizer, FAKE_SCORE: config.dmd.optimizer if config.dmd else config.optimizer}
    if network.adapter is not None:
        trained_shapes = adapter_shapes(shapes, network.adapter)
        base = stored_base(shapes, network.weights, sizes.num_layers, network.block_swap)
        rooms = [swap_rooms(shapes, network.weights, network.block_swap)] if network.block_swap else []
        roles = ", ".join((*trained, EMA))
        held = [
            replace(base, gpu=base.gpu / (sharers if network.shard else 1)),
            *rooms,
            Row(f"adapters of rank {network.adapter.rank}: {roles}", 4 * count(trained_shapes) * (len(trained) + 1)),
        ]
        part, loading = 1, one_tensor if network.shard else stored_base(shapes, network.weights, sizes.num_layers).gpu
    else:
        trained_shapes, part = dict(shapes), sharers if network.shard else 1
        weights = {role: weight_bytes(role, network) * count(trained_shapes) for role in (*trained, EMA, *frozen)}
        held = [Row(f"network of {role}", nbytes / part) for role, nbytes in weights.items()]
        loading = one_tensor if network.shard else sum(weights.values())
    for role in trained:
        held.append(Row(f"optimizer states of {role}", state_bytes(trained_shapes, optimizers[role]) / part))
    return Estimate(tuple(held), moments(config, sizes, shapes, 4 * count(trained_shapes) / part, processes), loading)


def weight_bytes(role: str, network: NetworkConfig) -> int:
    """Bytes per parameter of a role's separate network."""
    return 2 if role == TEACHER and network.weights == "bf16" else 4


def four_copies(config: RunConfig) -> Estimate:
    """Memory with separate networks for student, fake score, teacher and EMA on one machine.

    The release trains so, on a cluster.
    """
    network = replace(
        required(config.network), adapter=None, weights="bf16", block_swap=0, shard=False, shard_over=0, gather="auto"
    )
    return estimate_roles(replace(config, network=network), (STUDENT, FAKE_SCORE), (TEACHER,), 1)


def table(memory: Estimate) -> str:
    """Text table in GiB."""
    rest = [Row("context, fragmentation (assumed)", OUTSIDE), Row("total", memory.gpu, memory.main)]
    rows = [*memory.held, *(replace(row, name=f"at times: {row.name}") for row in memory.moments), *rest]
    lines = [f"{row.name:62} {row.gpu / GIB:8.2f} {row.main / GIB:8.2f}" for row in rows]
    return "\n".join([f"{'GiB':62} {'GPU':>8} {'main':>8}", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.memory", description=__doc__)
    parser.add_argument("config", help="a YAML file, see trainers/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example batch_size=2")
    parser.add_argument(
        "--processes", type=int, default=1, help="GPUs that share the batch and sharded networks (%(default)s)"
    )
    parser.add_argument("--machines", type=int, default=1, help="machines that share the processes (%(default)s)")
    parser.add_argument("--gib", type=float, help="memory of one GPU; exit status 1 if the run needs more")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        stages = [(stage, estimate(stage, args.processes)) for stage in config.stages or (config,)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worst = max(show(stage, estimated, args.processes, args.gib) for stage, estimated in stages)
    if args.processes > 1:
        each = -(-args.processes // args.machines)
        gpu, main = (each * max(getattr(e, name) for _, e in stages) / GIB for name in ("gpu", "main"))
        print(f"a machine of {each} processes: {gpu:.1f} GiB of its GPUs together, {main:.1f} GiB of main memory")
    return worst


def show(config: RunConfig, memory: Estimate, processes: int, gib: float | None) -> int:
    """Print the memory of a run, or of one of its stages; returns 1 if it exceeds `gib` of a GPU, else 0."""
    if config.stage:
        print(f"stage {config.stage}: {config.steps} steps, at most {tokens(config)} tokens a sample")
    print(table(memory))
    print(summary(config, sizes_of(required(config.network)), tokens(config), processes))
    if config.dmd is not None:
        print(f"four networks with all parameters would need {four_copies(config).gpu / GIB:.0f} GiB")
    if gib is not None:
        word = "fits in" if memory.gpu <= gib * GIB else "does not fit in"
        print(f"{memory.gpu / GIB:.1f} GiB {word} {gib:g} GiB")
    return int(gib is not None and memory.gpu > gib * GIB)


if __name__ == "__main__":
    sys.exit(main())
