"""What a run will need: against tensors that are really allocated, and against steps at the released size, counted with
tensors that have no memory."""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.paths import CONFIGS
from tests.trainers.tools import fakes
from trainers.config.methods import OptimizerConfig
from trainers.config.run import AdapterConfig, NetworkConfig, load_config, parse_run
from trainers.optimizers.by_name import make_optimizers
from trainers.roles.frozen import FrozenLinear, load_frozen
from trainers.roles.roles import AdapterRoles
from trainers.roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER, roles_of
from trainers.tools import memory
from trainers.tools.memory import GIB, estimate, four_copies
from unipic_core.cli.terminal import DEFAULT_MODEL
from unipic_core.conditioning.sequence import LatentShape, PackedLatents, TextCond
from unipic_core.model.attention import matmul_attention, scaled_dot_product_attention
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.weights.transformer import expected_shapes

RELEASED = expected_shapes(MMDiTConfig())


def config(method="consistency", network=None, **values):
    data = {"folder": "x", "kind": "jsonl", "path": "x", "size": 1024, "reference_budget": 1024}
    adapter = {"rank": 64, "alpha": 64.0}
    whole = {"model": "nowhere", "weights": "bf16", "gradient_checkpointing": True, "adapter": adapter}
    values = {"batch_size": 1, "precision": "bf16", "data": data, **values}
    return parse_run({"method": method, "output": "x", "network": {**whole, **(network or {})}, **values})


# --- what is held -----------------------------------------------------------------------------------------------------


def test_the_released_network_has_20_billion_parameters():
    assert memory.count(RELEASED) == sum(p.numel() for p in MMDiT(MMDiTConfig(), device="meta").parameters())
    assert memory.count(RELEASED) / 1e9 == pytest.approx(20.4, abs=0.05)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8", "nf4"])
@pytest.mark.parametrize("swap", [0, 2])
def test_the_base_is_counted_as_it_is_loaded(kind, swap, monkeypatch):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(memory, "pinned", lambda nbytes: nbytes)
    network = load_frozen(NetworkConfig(str(DEFAULT_MODEL), weights=kind, block_swap=swap, adapter=AdapterConfig()))
    behind = sum(
        m.weight.nbytes + (0 if m.scale is None else m.scale.nbytes)
        for m in network.modules()
        if isinstance(m, FrozenLinear) and not m.on_device
    )
    whole = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    row = memory.stored_base(expected_shapes(network.config), kind, network.config.num_layers, swap)
    assert (row.gpu, row.main) == (whole - behind, behind)


def test_pinned_memory_comes_in_powers_of_two():
    assert [memory.pinned(n) for n in (1, 4096, 4097, 3072 * 3072 * 2)] == [1, 4096, 8192, 2**25]


KINDS = [{"kind": "adafactor"}, {"kind": "prodigy", "lr": 1.0}, {"kind": "schedule_free"}, {"kind": "adamw8bit"}]


@pytest.mark.parametrize("options", [{}, {"muon_lr": 1e-2}, *KINDS], ids=str)
def test_adapters_and_their_states_are_counted_as_they_are_made(options):
    """On the nano, after one step of the real optimizers."""
    eight_bit = options.get("kind") == "adamw8bit"
    if eight_bit and not torch.cuda.is_available():
        pytest.skip("adamw8bit needs a GPU")
    adapter, optimizer = AdapterConfig(rank=8), OptimizerConfig(**options)
    network = load_frozen(NetworkConfig(str(DEFAULT_MODEL), adapter=adapter))
    roles = AdapterRoles(network, adapter, (STUDENT, FAKE_SCORE), seed=0)
    own = memory.adapter_shapes(expected_shapes(network.config), adapter)
    for role in (STUDENT, FAKE_SCORE, EMA):
        assert memory.count(own) == sum(p.numel() for _, p in roles.parameters_of(role))
    assert set(own) == {name for name, _ in roles.trained(STUDENT)}
    roles.place(torch.device("cuda" if eight_bit else "cpu"))
    made = make_optimizers(roles.trained(STUDENT), optimizer)
    for _, p in roles.trained(STUDENT):
        p.data.normal_()  # Prodigy stores nothing of weights that begin as zeros
        p.grad = torch.ones_like(p)
    for one in made:
        one.step()
    kept = [v for one in made for state in one.state.values() for v in state.values() if torch.is_tensor(v)]
    shared = {t.data_ptr(): t.nbytes for t in kept if t.numel() > 1}  # the 8-bit tables are one for all
    assert memory.state_bytes(own, optimizer) == pytest.approx(sum(shared.values()), rel=0.01, abs=4096)


def test_sizes_come_from_the_folder_or_are_the_released(tmp_path):
    sizes = memory.sizes_of(NetworkConfig(str(DEFAULT_MODEL)))
    assert (sizes.num_layers, sizes.width) == (6, 160)
    assert memory.sizes_of(NetworkConfig(str(DEFAULT_MODEL / "transformer"))) == sizes
    (file,) = (DEFAULT_MODEL / "transformer").glob("*.safetensors")
    assert memory.sizes_of(NetworkConfig("x", transformer=str(file))) == sizes
    assert memory.sizes_of(NetworkConfig(str(tmp_path / "none"))) == MMDiTConfig()


# --- what comes and goes ----------------------------------------------------------------------------------------------


def counted_step(run, layers):
    """(bytes that wait after the forward, most bytes beyond those and beyond gradients) of a step at the real width."""
    sizes, precision = MMDiTConfig(num_layers=layers), run.precision == "bf16"
    shape = LatentShape(1, 64, 64)
    with fakes.fake() as counted:
        if run.network.adapter:
            network = fakes.base(sizes, "bf16" if precision else "fp32")
            roles = AdapterRoles(network, run.network.adapter, (STUDENT,), 0)
        else:
            network = MMDiT(sizes, operations=fakes.PlainOperations, dtype=torch.float32)
        network.gradient_checkpointing = run.network.gradient_checkpointing
        latents = PackedLatents(torch.randn(1, 8192, 64), ((shape, shape),), 4096)
        inputs = latents, 0.5, TextCond(torch.randn(1, memory.tokens(run) - 8192, 3584))
        start = counted.peak = counted.now
        with torch.autocast("cpu", torch.bfloat16, enabled=precision, cache_enabled=False):
            v = roles(STUDENT, *inputs) if run.network.adapter else network(*inputs)
            loss = v.float().square().mean()
        waiting = counted.now - start
        loss.backward()
        gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
        return waiting, counted.peak - start - waiting, gradients


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_of_adapters_are_as_counted(precision, checkpointing):
    run = config(network={"gradient_checkpointing": checkpointing}, precision=precision)
    few, more = counted_step(run, 1), counted_step(run, 2)
    expected = [memory.activation_bytes(run, MMDiTConfig(num_layers=n)) for n in (1, 2)]
    assert expected[1][0] - expected[0][0] == pytest.approx(more[0] - few[0], rel=0.05)  # of one block
    assert more[1] == pytest.approx(expected[1][1], rel=0.1) or (not checkpointing and more[1] < expected[1][1])


def test_activations_of_full_training_are_as_counted():
    run = config(network={"gradient_checkpointing": False, "adapter": None})
    few, more = counted_step(run, 1), counted_step(run, 2)
    sizes = MMDiTConfig(num_layers=1)
    block = memory.count({n: s for n, s in expected_shapes(sizes).items() if memory.block_of(n) == 0})
    assert memory.activation_bytes(run, sizes)[0] + 2 * block == pytest.approx(more[0] - few[0], rel=0.05)


def test_a_forward_without_gradient_is_as_counted():
    run = config(precision="no")
    with fakes.fake() as counted, torch.no_grad():
        network = fakes.base(MMDiTConfig(num_layers=2), "fp32")
        roles = AdapterRoles(network, run.network.adapter, (STUDENT,), 0)
        shape = LatentShape(1, 64, 64)
        latents = PackedLatents(torch.randn(1, 8192, 64), ((shape, shape),), 4096)
        text = TextCond(torch.randn(1, memory.tokens(run) - 8192, 3584))
        start = counted.peak = counted.now
        roles(STUDENT, latents, 0.5, text)
    unit = memory.tokens(run) * 3072
    assert counted.peak - start == pytest.approx(memory.ACTIVATIONS["no"].forward * unit, rel=0.05)


@pytest.mark.parametrize("tangent", ["jvp", "difference"])
def test_scores_that_are_written_out_are_counted(tangent):
    """One head's attention in float32, without gradient, at 1,024 tokens."""
    with fakes.Counted() as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        q, k, v = (torch.randn(1, 1, 1024, 16) for _ in range(3))
        start = counted.peak = counted.now
        if tangent == "jvp":
            torch.func.jvp(scaled_dot_product_attention, (q, k, v), (q, k, v))
        else:
            matmul_attention(q, k, v)
    expected = memory.SCORES.jvp if tangent == "jvp" else memory.SCORES.forward
    assert (counted.peak - start) / 1024**2 == pytest.approx(expected, rel=0.1)


def test_exact_tangents_at_full_size_do_not_fit_where_differences_do():
    difference, jvp = (estimate(config(consistency={"tangent": tangent})).gpu for tangent in ("difference", "jvp"))
    assert difference < 60 * GIB < 80 * GIB < jvp


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_makes_a_run_larger_and_smaller():
    def gpu(method="consistency", network=None, processes=1, **values):
        return estimate(config(method, network, **values), processes).gpu

    usual = gpu()
    assert gpu(network={"weights": "nf4"}) < gpu(network={"weights": "fp8"}) < usual < gpu(network={"weights": "fp32"})
    assert gpu(network={"block_swap": 20}) == pytest.approx(usual - (20 - 2) * 340e6 * 2, rel=0.01)  # with room for two
    assert gpu("sft") <= usual < gpu("dmd") < gpu("joint")
    assert gpu(optimizer={"kind": "adamw8bit"}) < usual
    assert usual < gpu(network={"gradient_checkpointing": False})
    full = {"adapter": None, "shard": True}
    assert gpu(network=full, processes=16, batch_size=16) < gpu(network=full, processes=8, batch_size=8)
    swapped = estimate(config(network={"weights": "nf4", "block_swap": 20}))
    assert swapped.main == swapped.loading > 10 * GIB


def test_an_encoder_that_stays_is_counted():
    """The released one has 8.3 billion parameters, in bfloat16 on a GPU; the nano's is read from its folder."""
    run = config()
    live = replace(run, data=replace(run.data, text_storage="live"))
    assert estimate(live).gpu - estimate(run).gpu == pytest.approx(16.6e9, rel=0.01)
    assert memory.encoder_parameters(DEFAULT_MODEL) == pytest.approx(1.26e6, rel=0.01)


def test_a_limit_of_tokens_limits_memory():
    run = config(batch_size=4)
    whole, half, less = (estimate(replace(run, max_tokens=limit)).gpu for limit in (0, 2 * memory.tokens(run), 1))
    assert whole > half > less
    assert less == estimate(replace(run, batch_size=1)).gpu  # one sample is computed whatever the limit


def test_one_base_against_four_copies():
    """Issue: adapter mode against a network for each of student, fake score, teacher and EMA."""
    run = config("dmd")
    assert estimate(run).gpu < 60 * GIB
    # three in float32, one in bfloat16, two pairs of AdamW's moments, gradients
    assert four_copies(run).gpu > 700 * GIB


def test_a_teacher_that_nobody_asks_is_not_held():
    """The release's consistency tuning: the data's velocity, guided by the student's own average."""
    full, released = {"adapter": None}, {"velocity": "data", "guidance_from": "ema", "guidance": 2.75}
    asked, without = (estimate(config("consistency", full, consistency=c)).gpu for c in ({}, released))
    assert asked - without == pytest.approx(20.4e9 * 2, rel=0.01)
    assert roles_of(config("joint", consistency=released)) == ((STUDENT, FAKE_SCORE), (TEACHER,))


def test_the_command_line(capsys):
    path = str(CONFIGS / "unipic3-consistency-24gb.yaml")
    assert memory.main([path, "--gib", "24"]) == 0
    out = capsys.readouterr().out
    assert "frozen base, nf4" in out
    assert "fits in 24 GiB" in out
    assert memory.main([path, "network.weights=fp8", "network.block_swap=0", "--gib", "24"]) == 1
    assert "does not fit in 24 GiB" in capsys.readouterr().out
    assert "four networks" not in out
    for name, message in (("nano-vae", "method vae"), ("nano-sft-joint", "a trained text encoder")):
        assert memory.main([str(CONFIGS / f"{name}.yaml")]) == 2
        assert message in capsys.readouterr().err


# --- the configs of the released weights ------------------------------------------------------------------------------

HEADER = re.compile(r"#   python -m trainers\.memory (.*)\n# GPU ([\d.]+) GiB, main memory ([\d.]+) GiB\.")
CARDS = {"80gb": 79, "48gb": 47, "24gb": 23.5, "cluster": 79}
"""GiB that a card of that name has for programs."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("nano-*.yaml")), ids=lambda p: p.stem)
def test_a_config_of_the_nano_says_what_was_measured(path):
    assert re.search(r"\n# Memory measured on the CPU, all included: \d\.\d GiB", path.read_text())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("unipic3-*.yaml")), ids=lambda p: p.stem)
def test_a_config_says_what_it_will_need(path):
    text = path.read_text()
    command, gpu, main = HEADER.search(text).groups()
    named, *options = shlex.split(command)
    assert named == f"trainers/configs/{path.name}"
    processes = int(options[options.index("--processes") + 1]) if options else 1
    run = load_config(path)
    made = estimate(replace(run, network=replace(run.network, model="nowhere")), processes)
    assert float(gpu) == pytest.approx(made.gpu / GIB, abs=0.06)
    assert float(main) == pytest.approx(made.main / GIB, abs=0.06)
    assert made.gpu < 0.95 * CARDS[path.stem.split("-")[-1]] * GIB
    for program in ("cache", "train"):
        assert re.search(rf"-m trainers\.{program} {re.escape(named)}", text)
    assert run.output == f"runs/{path.stem}"
    assert f"runs/{path.stem}/export/unipic_distill" in text
