"""`python -m trainers.train`: what it passes on, and that errors end in one sentence."""

import pytest
import yaml

from tests.trainers.loop.loop_toy import Toy, config
from trainers import train as command
from trainers.config.run import to_dict


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A config of the toy in a file; the command trains the toy on it."""
    monkeypatch.setattr(command, "make_method", lambda config: Toy())
    made = to_dict(config(tmp_path / "run", steps=4))
    made["optimizer"]["betas"] = list(made["optimizer"]["betas"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "options",
    [
        ["--allow-config-change", "steps", "steps=6"],
        ["--allow-config-change=steps", "steps=6"],
        ["steps=6", "--allow-config-change", "seed", "--allow-config-change", "steps", "seed=3"],
    ],
    ids=str,
)
def test_allowed_changes_and_overrides_may_come_in_any_order(file, tmp_path, metrics, capsys, options):
    assert command.main([file]) == 0
    assert command.main([file, "steps=6"]) == 2
    assert "other values of steps" in capsys.readouterr().err
    assert command.main([file, *options]) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_what_cannot_be_written_is_said_in_one_line(file, tmp_path, capsys):
    (tmp_path / "occupied").write_text("")
    assert command.main([file, f"output={tmp_path / 'occupied'}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "expected a folder" in said[0]
    assert "occupied" in said[0]


def test_a_disk_that_fills_up_is_said_in_one_line(file, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainers.loop.metrics.MetricLog.write", full)
    assert command.main([file]) == 2
    assert "No space left on device; fix that" in capsys.readouterr().err
