"""Muon and the choice of what it trains; the other kinds, what they store, and where they are evaluated."""

import sys
import types

import pytest
import torch
from torch import nn

from tests.trainers.loop.loop_toy import Toy, config
from trainers.config.methods import OptimizerConfig
from trainers.config.run import ConfigError
from trainers.loop.loop import train
from trainers.optimizers.by_name import evaluated, lr_factor, make_optimizers
from trainers.optimizers.muon import Muon, is_hidden_matrix, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (5, 40)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert singular.min() > 0.5
    assert singular.max() < 1.4


def test_muon_solves_a_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator) * torch.logspace(0, -1, 8)
    truth = torch.randn(4, 8, generator=generator)
    layer = nn.Linear(8, 4, bias=False)
    optimizer = Muon(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 200)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - x @ truth.T).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    assert losses[-1] < 1e-3 * losses[0]


def test_convolutions_and_matrices_are_hidden_first_and_last_layers_are_not():
    w = torch.zeros(4, 4)
    assert is_hidden_matrix("transformer_blocks.0.attn.to_q.weight", w)
    assert is_hidden_matrix("encoder.down_blocks.0.conv1.weight", torch.zeros(4, 4, 3, 3))
    for name in ("img_in.weight", "proj_out.weight", "blocks.0.img_mod.1.weight", "embed_tokens.weight"):
        assert not is_hidden_matrix(name, w)
    assert not is_hidden_matrix("x.bias", torch.zeros(4))


def test_every_parameter_is_trained_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    for muon_lr, count in ((0.0, 1), (0.01, 2)):
        optimizers = make_optimizers(list(model.named_parameters()), OptimizerConfig(muon_lr=muon_lr))
        assert len(optimizers) == count
        ids = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_schedule():
    factor = lr_factor(OptimizerConfig(warmup_steps=10, final_lr_ratio=0.1), 110)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


# --- kinds ------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "adamw": {"lr": 1e-2},
    "adamw with muon": {"lr": 1e-2, "muon_lr": 1e-2},
    "adafactor": {"lr": 5e-2},
    "adafactor with muon": {"lr": 5e-2, "muon_lr": 1e-2},
    "prodigy": {"lr": 1.0},
    "schedule_free": {"lr": 1e-2},
}


def options_of(name, **values):
    return OptimizerConfig(kind=name.partition(" ")[0], **{"warmup_steps": 3, **OPTIONS[name], **values})


def run_config(name, output, **values):
    return config(output, **{"ema_decay": 0.0 if name == "schedule_free" else 0.9, **values})


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_resumes_bit_for_bit(tmp_path, metrics, name):
    """Interrupted between two checkpoints, at one, and with state that lies in the optimizer's groups."""

    def toy(**values):
        return Toy(options=options_of(name), **values)

    weights, averages = [], []
    for label, stops in (("whole", ()), ("broken", (13, 35, 71))):
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                train(run_config(name, tmp_path / label, steps=24), toy(fail_at=stop))
        last = toy()
        export = train(run_config(name, tmp_path / label, steps=24), last)
        weights.append(list(last.student.parameters()))
        averages.append(torch.load(export / "ema.pt", weights_only=True))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    for a, b in (weights, averages):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_learns(tmp_path, metrics, name):
    train(run_config(name, tmp_path, steps=150), Toy(options=options_of(name)))
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_schedule_free_is_evaluated_at_its_average():
    """The weights inside `evaluated` are those of the package's eval(), and the training ones come back exactly."""
    schedulefree = pytest.importorskip("schedulefree")
    x, layers = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)), []
    for make in (
        lambda p: make_optimizers(p, options_of("schedule_free", warmup_steps=0, weight_decay=0.0))[0],
        lambda p: schedulefree.AdamWScheduleFree([w for _, w in p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8),
    ):
        torch.manual_seed(0)
        layer = nn.Linear(6, 2)
        optimizer = make(list(layer.named_parameters()))
        optimizer.train()
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x) - x[:, :2]).square().mean().backward()
            optimizer.step()
        layers.append((layer, optimizer))
    (ours, optimizer), (theirs, reference) = layers
    before = [p.detach().clone() for p in ours.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, theirs.parameters(), strict=True))
    reference.eval()
    with evaluated([optimizer]):
        for p, y, q in zip(ours.parameters(), before, theirs.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-7)
            assert not torch.allclose(p, y, atol=1e-4)
    assert all(torch.equal(p, y) for p, y in zip(ours.parameters(), before, strict=True))


def test_previews_exports_and_averages_are_at_the_average(tmp_path):
    """The moving average of a schedule-free run is its average, and so is the student when it is drawn or exported."""
    seen = []

    class Watched(Toy):
        def look(self):
            pairs = zip(self.ema, self.student.parameters(), strict=True)
            seen.append(all(torch.equal(average, p) for average, p in pairs))

        def preview(self):
            self.look()
            return super().preview()

        def exports(self):
            self.look()
            return super().exports()

    toy = Watched(options=options_of("schedule_free"))
    train(run_config("schedule_free", tmp_path), toy)
    assert seen == [True] * 4  # before training, for its size; two previews; the export
    assert not torch.equal(toy.ema[0], next(iter(toy.student.parameters())))


def test_schedule_free_has_no_decay_and_prodigy_reports_its_rate(tmp_path, metrics):
    config_ = options_of("schedule_free")
    assert [lr_factor(config_, 100)(step) for step in (0, 2, 50, 100)] == [pytest.approx(1 / 3), 1, 1, 1]
    train(run_config("prodigy", tmp_path, steps=80), Toy(options=options_of("prodigy")))
    rates = [m["lr"] for m in metrics(tmp_path)]
    assert 0 < rates[0] < 1e-6 < 1e-4 < max(rates) < 1


@pytest.mark.parametrize(("kind", "package"), [("prodigy", "prodigyopt"), ("schedule_free", "schedulefree")])
def test_a_package_that_is_not_installed_is_named(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{kind} needs the package {package}; pip install .*\[optimizers\]"):
        make_optimizers([("w", nn.Parameter(torch.ones(2, 2)))], options_of(kind))


def test_eight_bits_on_a_cpu_are_refused():
    with pytest.raises(ConfigError, match="adamw8bit needs a GPU, and this run is on a CPU"):
        make_optimizers([("w", nn.Parameter(torch.ones(2, 2)))], OptimizerConfig(kind="adamw8bit"))


def test_eight_bits_are_bitsandbytes(monkeypatch):
    """The package and its arguments, without a GPU: parameters that lie on none."""
    made = types.SimpleNamespace(AdamW8bit=lambda groups, **options: (groups, options))
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", made)
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))
    (((group,), options),) = make_optimizers([("w", weight)], OptimizerConfig(kind="adamw8bit"))
    assert group["params"][0] is weight
    assert options == {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
