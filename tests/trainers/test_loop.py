"""The loop on a toy: resuming gives the numbers of an unbroken run; bad numbers and full disks are reported."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from trainers.config import OptimizerConfig, RunConfig, VAEMethod
from trainers.loop import TrainingError, newest_checkpoint, replace_folder, train


class Toy:
    """Regression on data that is a function of the step; `fail_at` breaks the run there."""

    loader_workers = 0

    def __init__(self, fail_at=None, bad_loss_at=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.fail_at, self.bad_loss_at = fail_at, bad_loss_at

    def to(self, device):
        pass

    def batch(self, step):
        if step == self.fail_at:
            raise KeyboardInterrupt
        return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))

    def loss(self, batch, step):
        loss = (self.model(batch) - batch[:, :2]).square().mean()
        return (loss * float("nan") if step == self.bad_loss_at else loss), {"half": float(loss.detach()) / 2}

    def preview(self, ema):
        return Image.new("RGB", (8, 8))

    def export(self, ema, folder):
        torch.save(ema.state_dict(), folder / "ema.pt")


def config(output, **changes):
    values = {
        "method": "vae",
        "output": str(output),
        "options": VAEMethod(),
        "steps": 12,
        "accumulation": 2,
        "save_every": 4,
        "sample_every": 6,
        "log_every": 1,
        "optimizer": OptimizerConfig(lr=1e-2, muon_lr=1e-2, warmup_steps=3),
    }
    return RunConfig(**{**values, **changes})


def metrics(output):
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("fail_at", [9, 13, 23])
def test_resume_is_exact(tmp_path, fail_at, log_every):
    """Log windows need not divide the checkpoints' interval."""
    whole = train(config(tmp_path / "whole", log_every=log_every), Toy())
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "broken", log_every=log_every), Toy(fail_at=fail_at))
    resumed = train(config(tmp_path / "broken", log_every=log_every), Toy())
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    a, b = (torch.load(folder / "ema.pt", weights_only=True) for folder in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_does_nothing_more(tmp_path):
    train(config(tmp_path), Toy())
    before = metrics(tmp_path)
    train(config(tmp_path), Toy(fail_at=0))
    assert metrics(tmp_path) == before


def test_training_learns_and_leaves_its_files(tmp_path):
    train(config(tmp_path, steps=40), Toy())
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert losses[-1] < losses[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000036", "step-0000040"]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 7
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 6; the last good checkpoint is .*step-0000004"):
        train(config(tmp_path), Toy(bad_loss_at=11))
    assert newest_checkpoint(tmp_path).name == "step-0000004"


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    replace_folder(tmp_path / "a", lambda f: (f / "x").write_text("1"))

    def full_disk(folder):
        (folder / "x").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        replace_folder(tmp_path / "a", full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_another_config_is_refused_unless_allowed(tmp_path):
    train(config(tmp_path), Toy())
    other = config(tmp_path, steps=14, optimizer=OptimizerConfig(lr=2e-2, muon_lr=1e-2, warmup_steps=3))
    with pytest.raises(TrainingError, match=r"other values of optimizer\.lr, steps; .*--allow-config-change"):
        train(other, Toy())
    train(other, Toy(), allow_change=["optimizer.lr", "steps"])
    assert metrics(tmp_path)[-1]["step"] == 14


def test_fewer_steps_than_done_is_an_error(tmp_path):
    train(config(tmp_path), Toy())
    with pytest.raises(TrainingError, match="already trained 12 steps"):
        train(config(tmp_path, steps=5), Toy(), allow_change=["steps"])


def test_a_half_written_last_line_does_not_block_resuming(tmp_path):
    train(config(tmp_path), Toy())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(config(tmp_path, steps=14), Toy(), allow_change=["steps"])
    assert [m["step"] for m in metrics(tmp_path)][-2:] == [13, 14]


def test_accumulated_losses_are_averaged(tmp_path):
    """Two micro batches: the record is their mean, and `half` is half of it."""
    train(config(tmp_path), Toy())
    assert all(m["half"] == pytest.approx(m["loss"] / 2) for m in metrics(tmp_path))
