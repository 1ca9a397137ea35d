"""Roles: one base with adapters switched, or separate networks; what trains, what is frozen, what belongs together."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from trainers.config.run import AdapterConfig, ConfigError
from trainers.roles.roles import AdapterRoles, FullRoles
from trainers.roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER, require_roles
from unipic_core.conditioning.sequence import LatentShape, TextCond, pack_with_references
from unipic_core.model.config import MMDiTConfig
from unipic_core.model.mmdit import MMDiT
from unipic_core.sampling.flow import add_noise
from unipic_core.weights.lora import read_lora, save_adapter

SIZES = MMDiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12, axes_dims_rope=(4, 6, 6)
)
ADAPTER = AdapterConfig(rank=4, alpha=8.0)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    made = MMDiT(replace(SIZES, **changes))
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    x0, shape = torch.randn(2, 4, 64, generator=g), LatentShape(1, 2, 2)
    references = [[torch.randn(16, 1, 4, 4, generator=g)] for _ in range(2)]
    text = TextCond(torch.randn(2, 5, 12, generator=g))
    return pack_with_references(add_noise(x0, torch.randn(x0.shape, generator=g), 0.5), shape, references), 0.5, text


def adapters(base=None, trained=(STUDENT, FAKE_SCORE), **adapter):
    return AdapterRoles(base or network(), replace(ADAPTER, **adapter), trained, seed=3)


def fill(roles, role, seed):
    g = torch.Generator().manual_seed(seed)
    for _, p in roles.parameters_of(role):
        p.data = torch.randn(p.shape, generator=g) * 0.1


def test_every_role_starts_as_the_base_and_the_teacher_stays_it(inputs):
    base = network()
    with torch.no_grad():
        expected = base(*inputs)
        roles = adapters(base)
        for role in (STUDENT, FAKE_SCORE, EMA, TEACHER):
            assert torch.allclose(roles(role, *inputs), expected, atol=1e-6), role
        fill(roles, STUDENT, 1)
        fill(roles, FAKE_SCORE, 2)
        made = {role: roles(role, *inputs) for role in (STUDENT, FAKE_SCORE, EMA, TEACHER)}
    assert torch.allclose(made[TEACHER], expected, atol=1e-6)
    assert torch.allclose(made[EMA], expected, atol=1e-6)
    assert not torch.allclose(made[STUDENT], expected, atol=1e-2)
    assert not torch.allclose(made[STUDENT], made[FAKE_SCORE], atol=1e-2)


def test_an_adapter_is_the_lora_file_it_is_saved_as(inputs, tmp_path):
    roles = adapters()
    fill(roles, STUDENT, 1)
    save_adapter(tmp_path / "a.safetensors", roles.adapter(STUDENT))
    again = adapters()
    again.start_from(tmp_path / "a.safetensors", (STUDENT, EMA))
    with torch.no_grad():
        wanted = roles(STUDENT, *inputs)
        for role in (STUDENT, EMA):
            assert torch.allclose(again(role, *inputs), wanted, atol=2e-2)  # the file is bfloat16
        assert not torch.allclose(again(FAKE_SCORE, *inputs), wanted, atol=5e-2)
    assert read_lora(tmp_path / "a.safetensors").ranks == (4,)
    with pytest.raises(ConfigError, match=r"does not fit network.adapter: in .* expected rank 8, got 4"):
        adapters(rank=8).start_from(tmp_path / "a.safetensors", (STUDENT,))
    with pytest.raises(ConfigError, match="differ"):
        adapters(targets=("to_q",)).start_from(tmp_path / "a.safetensors", (STUDENT,))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_belongs_to_its_role_whoever_was_asked_in_between(inputs, checkpointing, dropout):
    """Blocks that are computed again in the backward pass run under the adapter of their own forward."""
    gradients = []
    for others in (False, True):
        roles = adapters(dropout=dropout)
        roles.network.gradient_checkpointing = checkpointing
        fill(roles, STUDENT, 1)
        fill(roles, FAKE_SCORE, 2)
        torch.manual_seed(0)
        v = roles(STUDENT, *inputs)
        if others:
            with torch.no_grad():
                roles(FAKE_SCORE, *inputs)
                roles(TEACHER, *inputs)
        v.square().mean().backward()
        gradients.append([p.grad for _, p in roles.trained(STUDENT)])
        assert all(p.grad is None for _, p in roles.trained(FAKE_SCORE))
        assert all(p.grad is None for _, p in roles.parameters_of(EMA))
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None or b is not None]
    assert len(pairs) > 20
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "form",
    [{"zero_cond_t": True}, {"attention_form": "reference_causal"}, {"attention_form": "prefix_causal"}],
    ids=str,
)
def test_a_role_brings_its_form(inputs, form):
    """A student with other modulation or attention than its teacher: switched with the adapter, both ways."""
    base = network()
    modulated = network(**form)  # the same weights
    with torch.no_grad():
        plain, zero = base(*inputs), modulated(*inputs)
        assert not torch.allclose(plain, zero, atol=1e-3)
        forms = {STUDENT: modulated.config, EMA: modulated.config}
        roles = AdapterRoles(base, ADAPTER, (STUDENT,), 0, forms)
        for _ in range(2):
            assert torch.allclose(roles(TEACHER, *inputs), plain, atol=1e-6)
            assert torch.allclose(roles(STUDENT, *inputs), zero, atol=1e-6)


def test_adapters_train_in_float32_and_the_same_seed_makes_the_same():
    roles, again = adapters(network().bfloat16()), adapters()
    assert all(p.dtype is torch.float32 for _, p in roles.trained(STUDENT))
    for (_, a), (_, b) in zip(roles.trained(STUDENT), again.trained(STUDENT), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for _, p in roles.parameters_of(EMA))


def test_dropout_acts_in_training_alone(inputs):
    roles = adapters(dropout=0.5)
    fill(roles, STUDENT, 1)
    with torch.no_grad():
        assert torch.equal(roles(STUDENT, *inputs), roles(STUDENT, *inputs))
    assert not torch.equal(roles(STUDENT, *inputs), roles(STUDENT, *inputs))


def test_full_roles_are_networks_of_their_own(inputs):
    roles = FullRoles({STUDENT: network(1), EMA: network(1), TEACHER: network(2)}, (STUDENT,))
    roles(STUDENT, *inputs).square().mean().backward()
    assert all(p.grad is None for role in (TEACHER, EMA) for _, p in roles.parameters_of(role))
    assert any(p.grad is not None for _, p in roles.trained(STUDENT))
    with torch.no_grad():
        assert torch.equal(roles(STUDENT, *inputs), roles(EMA, *inputs))
        assert not torch.equal(roles(STUDENT, *inputs), roles(TEACHER, *inputs))


def test_wrong_sets_of_roles_are_refused():
    student_only = adapters(trained=(STUDENT,))
    require_roles(student_only, (STUDENT,), (TEACHER,))
    with pytest.raises(ConfigError, match="needs the role fake_score, got ema, student, teacher"):
        require_roles(student_only, (STUDENT, FAKE_SCORE), (TEACHER,))
    learning = FullRoles({STUDENT: network(), TEACHER: network(), EMA: network()}, (STUDENT, TEACHER))
    with pytest.raises(ConfigError, match="the role teacher must be frozen in this method, but it trains"):
        require_roles(learning, (STUDENT,), (TEACHER,))
    with pytest.raises(ConfigError, match="the role fake_score must be frozen in this method, but it trains"):
        require_roles(adapters(), (STUDENT,), (TEACHER,))
    still = FullRoles({STUDENT: network(), TEACHER: network(), EMA: network()}, ())
    with pytest.raises(ConfigError, match="the role student must train"):
        require_roles(still, (STUDENT,), (TEACHER,))
    with pytest.raises(ConfigError, match=r"adapter.targets: expected suffixes of layer names, got to_x"):
        adapters(targets=("to_x",))


def test_a_rank_above_the_layers_width_is_refused():
    with pytest.raises(ConfigError, match=r"network.adapter.rank: expected at least 1 and at most the layer's width"):
        adapters(rank=100000)
