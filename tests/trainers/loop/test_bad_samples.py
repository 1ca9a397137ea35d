"""Bad samples: the run stops at the first, or goes on without them and says so; several processes do as one."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers.processes import launch
from tests.trainers.roles.test_sharding import written
from trainers.config.run import ConfigError, DataConfig, parse_run, to_dict
from trainers.data.checking import check_rows
from trainers.loop import bad_samples
from trainers.loop.checkpointing import TrainingError
from trainers.loop.loop import train
from trainers.methods.sft import SFTTraining

FROZEN = {"train_text_encoder": False}


@pytest.fixture
def spoilt(changed, tmp_path):
    """A run over a copy of the cache of which the first `count` targets are not numbers."""

    def make(count=1, **values):
        config = changed(sections={"sft": FROZEN})
        folder = tmp_path / "cache"
        if not folder.exists():
            folder.mkdir()
            left = count
            for path in sorted(Path(config.data.folder).iterdir()):
                if not path.name.startswith("shard-"):
                    (folder / path.name).write_bytes(path.read_bytes())
                    continue
                tensors, header = load_file(path), metadata_of(path)
                for name in sorted(n for n in tensors if n.endswith("/target")):
                    spoilt = min(left, len(tensors[name]))
                    tensors[name][:spoilt] = float("nan")
                    left -= spoilt
                save_file(tensors, folder / path.name, header)
        sections = {"sft": FROZEN, "data": {"folder": str(folder)}, "optimizer": {"muon_lr": 0.0}}
        return changed(sections=sections, **{"steps": 12, "save_every": 6, "sample_every": 12, **values})

    return make


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_stops_at_a_bad_sample_and_goes_on_when_told_to_skip(spoilt, metrics, capsys):
    """48 rows in batches of 4: all are seen in 12 steps, whatever their order."""
    with pytest.raises(TrainingError, match=r"a loss became NaN or infinite in step \d+ \(sample \d of rows "):
        train(spoilt(), SFTTraining(spoilt()))
    config = spoilt(bad_samples="skip")
    train(config, SFTTraining(config), [])
    said = capsys.readouterr().err
    assert len(re.findall(r"warning: step \d+ goes on without row \d+ of the cache: its cached", said)) == 1
    records = [record for record in metrics(config.output) if "skipped_samples" in record]
    assert sum(record["skipped_samples"] for record in records) == 1
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)


def test_a_batch_of_bad_samples_alone_is_skipped_too(spoilt, metrics):
    config = spoilt(count=5, bad_samples="skip", batch_size=1, steps=48, log_every=1)
    train(config, SFTTraining(config))
    records = [record for record in metrics(config.output) if "skipped_samples" in record]
    assert [record["loss"] == 0 for record in records] == [record["skipped_samples"] == 1 for record in records]
    assert sum(record["skipped_samples"] for record in records) == 5


def test_a_model_that_broke_down_is_not_skipped_over(spoilt, monkeypatch):
    monkeypatch.setattr(bad_samples, "MOST_IN_A_ROW", 3)
    config = spoilt(count=48, bad_samples="skip")
    with pytest.raises(TrainingError, match="4 samples in a row were unusable"):
        train(config, SFTTraining(config))


def test_a_loss_that_is_not_finite_is_left_out_and_the_others_stay(spoilt, metrics):
    """The gradient of a batch is that of its good samples."""

    class Breaks(SFTTraining):
        def loss(self, part, batch):
            losses, values = super().loss(part, batch)
            bad = torch.tensor([row == self.order[0][0] for row in batch.rows])
            return torch.where(bad, torch.full_like(losses, float("inf")), losses), values

    config = spoilt(count=0, bad_samples="skip", log_every=1)
    train(config, Breaks(config))
    plain = spoilt(count=0, log_every=1)
    plain = parse_run({**to_dict(plain), "output": plain.output + "-plain"})
    train(plain, SFTTraining(plain))
    ours, theirs = metrics(config.output)[0], metrics(plain.output)[0]
    assert ours["skipped_samples"] == 1
    assert 0 < ours["loss"] < theirs["loss"]


def test_two_processes_skip_the_same(spoilt, metrics, tmp_path):
    config = spoilt(bad_samples="skip")
    train(config, SFTTraining(config))
    other = parse_run({**to_dict(config), "output": str(tmp_path / "two")})
    launch(2, "-m", "trainers.train", written(other, tmp_path / "run.yaml"))
    for a, b in zip(metrics(config.output), metrics(tmp_path / "two"), strict=True):
        assert a["skipped_samples"] == b["skipped_samples"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_the_intervals_and_the_policy_may_change_on_resuming(spoilt, metrics):
    config = spoilt(count=0)
    train(config, SFTTraining(config))
    changes = {"log_every": 3, "save_every": 5, "sample_every": 7, "save_minutes": 9.0, "keep_checkpoints": 1}
    other = parse_run({**to_dict(config), **changes, "bad_samples": "skip", "trackers": ["tensorboard"]})
    before = metrics(config.output)
    train(other, SFTTraining(other))  # finished: it goes on, and does nothing more
    assert metrics(config.output) == before


def test_what_cannot_skip_says_so(changed):
    with pytest.raises(ConfigError, match="bad_samples: skip needs cached rows"):
        parse_run({"method": "vae", "output": "x", "bad_samples": "skip"})
    with pytest.raises(ConfigError, match="bad_samples must be one of stop, skip"):
        parse_run({"method": "vae", "output": "x", "bad_samples": "no"})
    with pytest.raises(ConfigError, match="trackers must be of tensorboard and wandb, got 'paper'"):
        parse_run({"method": "vae", "output": "x", "trackers": ["paper"]})


def test_wandb_is_asked_for_by_name(tmp_path, monkeypatch):
    from tests.trainers.loop.loop_toy import Toy, config

    monkeypatch.setattr("trainers.loop.loop.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run pip install wandb"):
        train(config(tmp_path, trackers=("tensorboard", "wandb")), Toy())


def test_a_bad_row_stops_the_cache_where_asked(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_images": [], "instruction": "", "output_image": "t.png"}')
    data = DataConfig(folder="c", kind="jsonl", path=str(tmp_path / "rows.jsonl"), bad_rows="stop")
    with pytest.raises(ConfigError, match=r"line 1 of .*: no instruction; correct it, or skip such rows"):
        check_rows(data)
