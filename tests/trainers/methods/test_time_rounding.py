"""Times that the networks of a training are fed: rounded as in the release in bfloat16 SFT, exact everywhere else."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from trainers.methods.consistency import ConsistencyTraining
from trainers.methods.inputs import Draws
from trainers.methods.sft import SFTTraining
from unipic_core.sampling.flow import add_noise

FROZEN = {"sft": {"train_text_encoder": False}}


def released(run, folder: Path) -> str:
    """The untrained model with a recipe that asks for what the release does."""
    model = shutil.copytree(run.network.model, folder)
    recipe = json.loads((model / "recipe.json").read_text())
    assert recipe.pop("time_rounding") == "none", "the nano trains on exact times"
    (model / "recipe.json").write_text(json.dumps(recipe))
    return str(model)


def fed(method, monkeypatch) -> list:
    """(x_t, t) of every call of a network in one loss, and the batch."""
    calls, batch = [], method.batch(0).micro_batches[0]
    role = type(method).role

    def watched(self, name, batch, text=None):
        network = role(self, name, batch, text)
        return lambda x_t, t: calls.append((x_t, t)) or network(x_t, t)

    monkeypatch.setattr(type(method), "role", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=method.config.precision == "bf16"):
        method.loss("student", batch)
    return [batch, *calls]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("rounding", ["release", "none"])
def test_sft(run, changed, tmp_path, monkeypatch, precision, rounding):
    sections = dict(FROZEN)
    if rounding == "release":
        sections["network"] = {"model": released(run, tmp_path / "model")}
    method = SFTTraining(changed(sections=sections, precision=precision))
    batch, (x_t, t) = fed(method, monkeypatch)
    if (precision, rounding) != ("bf16", "release"):
        assert not torch.equal(t, t.bfloat16().float())
        return
    assert torch.equal(t, t.bfloat16().float())
    draws = Draws(method.config.seed, batch)
    drawn = method.times(draws, method.options.times).bfloat16()
    assert torch.equal(t, ((drawn * 1000) / 1000).float())
    assert torch.equal(x_t, add_noise(batch.x0, draws.noise(), drawn.float())), "noised to the time that was drawn"


def test_a_consistency_tangent_is_taken_at_exact_times(run, changed, tmp_path, monkeypatch):
    sections = {"network": {"model": released(run, tmp_path / "model"), "adapter": {"rank": 2, "alpha": 4.0}}}
    method = ConsistencyTraining(changed("consistency", sections, precision="bf16"))
    _, *calls = fed(method, monkeypatch)
    (_, after), (_, before), (_, t) = [call for call in calls if isinstance(call[1], torch.Tensor)][-3:]
    assert not torch.equal(t, t.bfloat16().float())
    torch.testing.assert_close(after - before, (t + 5e-3).clamp(max=1) - (t - 5e-3).clamp(min=0))
    assert method.student_recipe.time_rounding == "none", "so that the student is sampled as it was trained"
