"""Hours of 1,000 steps: operations against those that torch counts, and the figures that the configs state."""

import re
from dataclasses import replace

import pytest
import torch

from tests.benchmarks.arithmetic import Load, count_flops, step_flops
from tests.paths import CONFIGS
from trainers.config.run import AdapterConfig, ConfigError, NetworkConfig, load_config
from trainers.roles.frozen import load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.tools import memory
from trainers.tools.hours import CARDS, forward_operations, hours, passes_of, summary
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.config import MMDiTConfig

LINE = re.compile(r"\n# Time of 1,000 steps: H100 (\S+) h, A100 (\S+) h \((.*)")


def released(name):
    run = load_config(CONFIGS / f"{name}.yaml")
    return replace(run, network=replace(run.network, model="nowhere"))


def estimated(run, processes=1):
    sizes = memory.sizes_of(run.network)
    return [hours(run, sizes, memory.tokens(run), card, processes) for card in CARDS]


def test_operations_of_a_forward_pass_are_those_of_the_released_network():
    load = Load(LatentShape(1, 64, 64), (LatentShape(1, 64, 64),), text=1152)
    matrices, attention = forward_operations(MMDiTConfig(), load.total)
    assert matrices + attention == pytest.approx(step_flops(MMDiTConfig(), load), rel=0.02)


def test_a_step_under_adapters_costs_the_operations_that_torch_counts():
    """Forward and backward of the nano's network, without checkpointing; LoRAs aside."""
    network = load_frozen(NetworkConfig(str(DEFAULT_MODEL), adapter=AdapterConfig(rank=1)))
    roles = AdapterRoles(network, AdapterConfig(rank=1), ("student",), 0)
    shape = LatentShape(1, 16, 16)
    latents = PackedLatents(torch.randn(1, 512, 64), ((shape, shape),), 256)
    text = TextCond(torch.randn(1, 64, network.config.joint_attention_dim))
    counted = count_flops(lambda: roles("student", latents, 0.5, text).square().mean().backward())
    matrices, attention = forward_operations(network.config, 576)
    assert counted == pytest.approx(2 * matrices + 3 * attention, rel=0.15)  # torch counts no recomputed scores


def test_evaluations_of_each_method():
    run = released("unipic3-consistency-80gb")
    made = passes_of(run)
    assert (made.forward, made.backward, made.float32) == (2, 1, 2)  # the guided teacher, the student, the difference
    matching = passes_of(released("unipic3-dmd-80gb"))
    # five rollouts of 1 to 4 steps, the student's but for its last step, a guided teacher and a fake score
    assert (matching.forward, matching.backward, matching.float32) == (5 * 2.5 + 1.5 + 3, 6, 0)
    with pytest.raises(ConfigError, match="method vae"):
        passes_of(load_config(CONFIGS / "nano-vae.yaml"))


def test_what_takes_longer():
    run = released("unipic3-consistency-80gb")
    usual = estimated(run)
    assert usual[1] > 2 * usual[0]
    assert estimated(replace(run, accumulation=32))[0] == pytest.approx(2 * usual[0])
    assert estimated(replace(run, batch_size=8), processes=8)[0] == pytest.approx(usual[0])
    full = replace(run, network=replace(run.network, adapter=None))
    assert (
        estimated(full)[0]
        > usual[0]
        > estimated(replace(run, network=replace(run.network, gradient_checkpointing=False)))[0]
    )
    tangent = replace(run, consistency=replace(run.consistency, tangent="jvp"))
    assert estimated(tangent)[0] > usual[0]


def test_the_float32_tangent_is_most_of_a_consistency_step():
    """Issue: 80% of it at 20 billion parameters, by arithmetic."""
    run = released("unipic3-consistency-80gb")
    one = hours(run, MMDiTConfig(), memory.tokens(run), CARDS[0])
    without = hours(replace(run, consistency=None, method="sft"), MMDiTConfig(), memory.tokens(run), CARDS[0])
    teacher = without * 2 / 3.1  # two forwards beside a forward, its repetition and a backward of about 1.1
    assert 0.75 < (one - without - teacher) / one < 0.9


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_config_says_how_long_it_will_take(path):
    run, text = load_config(path), path.read_text()
    if run.network is None:
        assert "minutes on two CPU cores" in text
        return
    model = str(DEFAULT_MODEL) if path.stem.startswith("nano") else "nowhere"
    run = replace(run, network=replace(run.network, model=model, transformer=None))
    processes = int(found[1]) if (found := re.search(r"--processes (\d+)", text)) else 1
    said = LINE.search(text)
    expected = summary(run, memory.sizes_of(run.network), memory.tokens(run), processes)
    assert said[0].strip()[3:].startswith(expected[1:] + " (")
