"""The loop on a toy: resuming gives the numbers of an unbroken run, whatever stopped it, and several processes those of
one; bad numbers and full disks are reported."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from loop_toy import Toy, config, optimizer
from processes import ENV, launch

from trainers.checkpointing import TrainingError, newest_checkpoint, replaced
from trainers.config import ConfigError
from trainers.loop import Share, train

TOY = Path(__file__).with_name("loop_toy.py")


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("fail_at", [13, 30, 35, 71])
def test_resume_is_exact(tmp_path, metrics, fail_at, log_every):
    """Log windows need not divide the checkpoints' interval."""
    whole = train(config(tmp_path / "whole", log_every=log_every), Toy())
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "broken", log_every=log_every), Toy(fail_at=fail_at))
    resumed = train(config(tmp_path / "broken", log_every=log_every), Toy())
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    a, b = (torch.load(folder / "ema.pt", weights_only=True) for folder in (whole, resumed))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_finished_run_does_nothing_more(tmp_path, metrics):
    train(config(tmp_path), Toy())
    before = metrics(tmp_path)
    train(config(tmp_path), Toy(fail_at=0))
    assert metrics(tmp_path) == before


def test_training_learns_and_leaves_its_files(tmp_path, metrics):
    train(config(tmp_path, steps=40), Toy())
    losses = [m["loss"] for m in metrics(tmp_path)]
    assert losses[-1] < losses[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000036", "step-0000040"]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 7
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 6 \(sample 1 of points 35\); the last good .*step-0000004"):
        train(config(tmp_path), Toy(bad_loss_at=35))
    assert newest_checkpoint(tmp_path).name == "step-0000004"


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    accelerator = Accelerator(cpu=True)
    with replaced(accelerator, tmp_path / "a") as folder:
        (folder / "x").write_text("1")

    def full_disk():
        with replaced(accelerator, tmp_path / "a") as folder:
            (folder / "x").write_text("2")
            raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        full_disk()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_another_config_is_refused_unless_allowed(tmp_path, metrics):
    train(config(tmp_path), Toy())
    other = config(tmp_path, steps=14, optimizer=optimizer(lr=2e-2))
    with pytest.raises(TrainingError, match=r"other values of optimizer\.lr, steps; .*--allow-config-change"):
        train(other, Toy())
    train(other, Toy(), allow_change=["optimizer.lr", "steps"])
    assert metrics(tmp_path)[-1]["step"] == 14


def test_fewer_steps_than_done_is_an_error(tmp_path):
    train(config(tmp_path), Toy())
    with pytest.raises(TrainingError, match="already trained 12 steps"):
        train(config(tmp_path, steps=5), Toy(), allow_change=["steps"])


def test_a_half_written_last_line_does_not_block_resuming(tmp_path, metrics):
    train(config(tmp_path), Toy())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(config(tmp_path, steps=14), Toy(), allow_change=["steps"])
    assert [m["step"] for m in metrics(tmp_path)][-2:] == [13, 14]


def test_accumulated_losses_are_averaged(tmp_path, metrics):
    """Two micro batches: the record is their mean, and `half` is half of it."""
    train(config(tmp_path), Toy())
    rows = metrics(tmp_path)
    assert all(m["half"] == pytest.approx(m["loss"] / 2) for m in rows)
    assert all(m["other/half"] == pytest.approx(m["other/loss"] / 2) for m in rows)


def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(tmp_path, metrics):
    """Kill -9 while it trains, writes a checkpoint or starts; the newest whole checkpoint carries on."""
    whole = train(config(tmp_path / "whole", steps=60), Toy())
    broken = tmp_path / "broken"
    for moment in range(3):
        program = subprocess.Popen([sys.executable, str(TOY), str(broken), "60"], stderr=subprocess.DEVNULL, env=ENV)
        while program.poll() is None and not advanced(broken, moment):
            time.sleep(0.002)
        program.send_signal(signal.SIGKILL)
        program.wait()
    before = newest_checkpoint(broken)
    assert before is not None
    resumed = train(config(broken, steps=60), Toy())
    assert metrics(broken) == metrics(whole.parent)
    a, b = (torch.load(folder / "ema.pt", weights_only=True) for folder in (whole, resumed))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def advanced(output, moment):
    """First and last: some steps after a checkpoint; between: while one is being written."""
    folder = output / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if moment == 1:
        return any(n.startswith(".") for n in names)
    return any(n > f"step-{8 + 16 * moment:07d}" for n in names)


def test_two_processes_give_the_numbers_of_one(tmp_path, metrics):
    one = train(config(tmp_path / "one"), Toy())
    launch(2, str(TOY), str(tmp_path / "two"), "12")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["other/loss"] == pytest.approx(b["other/loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    alone, together = (torch.load(f / "ema.pt", weights_only=True) for f in (one, tmp_path / "two" / "export"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, together, strict=True))


def test_a_batch_that_cannot_be_shared_is_refused():
    assert [Share(i, 2).part(6) for i in (0, 1)] == [slice(0, 3), slice(3, 6)]
    with pytest.raises(ConfigError, match="batch_size 5 cannot be shared evenly by 2 processes"):
        Share(0, 2).part(5)
