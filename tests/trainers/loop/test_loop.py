"""The loop on a toy: resuming gives the numbers of an unbroken run, whatever stopped it, and several processes those of
one; bad numbers and full disks are reported."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainers.loop.loop_toy import Toy, config, optimizer
from tests.trainers.processes import ENV, launch
from trainers.config.methods import OptimizerConfig
from trainers.config.run import ConfigError
from trainers.loop.checkpointing import TrainingError, newest_checkpoint, resume, whole_folder
from trainers.loop.loop import PATIENCE, make_accelerator, train
from trainers.loop.method import Share
from trainers.loop.metrics import MetricLog
from trainers.loop.parts import Part, make_parts
from trainers.loop.state import State
from trainers.optimizers.by_name import lr_factor
from unipic_core.sampling.samplers import NonFiniteLatent

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


def test_dropout_follows_the_seed_and_a_resumed_run_draws_the_same(tmp_path, metrics):
    torch.manual_seed(1)
    train(config(tmp_path / "whole"), Toy(dropout=0.5))
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "broken"), Toy(fail_at=35, dropout=0.5))
    train(config(tmp_path / "broken"), Toy(dropout=0.5))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    train(config(tmp_path / "other", seed=1), Toy(dropout=0.5))
    losses = [[m["loss"] for m in metrics(tmp_path / name)] for name in ("whole", "other")]
    assert all(a != b for a, b in zip(*losses, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="no locks")
def test_two_runs_never_share_a_folder(tmp_path, metrics):
    class Second(Toy):
        def preview(self):
            with pytest.raises(TrainingError, match=f"another run is training in {tmp_path}; wait for its end"):
                train(config(tmp_path), Toy())
            return super().preview()

    train(config(tmp_path), Second())
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 13))
    train(config(tmp_path), Toy())  # free again


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


def test_the_last_steps_are_recorded(tmp_path, metrics):
    train(config(tmp_path, steps=11, log_every=4), Toy())
    assert [m["step"] for m in metrics(tmp_path)] == [4, 8, 11]


def test_a_preview_that_a_kill_prevented_is_drawn_on_resuming(tmp_path):
    class Dying(Toy):
        def preview(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, sample_every=8), Dying())
    assert newest_checkpoint(tmp_path).name == "step-0000008"
    train(config(tmp_path, sample_every=8), Toy())
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-0000008.png", "step-0000012.png"]


def test_what_came_after_the_checkpoint_is_gone_from_the_board(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path), Toy(fail_at=41))
    train(config(tmp_path), Toy())
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 13))


def test_non_finite_loss_stops_the_run_and_names_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 6 \(sample 1 of points 35\); the last good .*step-0000004"):
        train(config(tmp_path), Toy(bad_loss_at=35))
    assert newest_checkpoint(tmp_path).name == "step-0000004"


def test_a_latent_that_breaks_down_within_a_loss_is_named_too(tmp_path):
    class Rolling(Toy):
        def loss(self, part, batch):
            if batch.index == 35:
                raise NonFiniteLatent(2)
            return super().loss(part, batch)

    with pytest.raises(TrainingError, match=r"NaN or infinite in step 6 \(points 35\); the last good .*step-0000004"):
        train(config(tmp_path), Rolling())


@pytest.mark.parametrize(("most", "clipped"), [(0.0, False), (0.1, True)])
def test_gradients_are_clipped_to_a_length_and_by_zero_not_at_all(most, clipped):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.ones(3, 4)
    part = Part("student", [("weight", weight)], OptimizerConfig(lr=1.0, max_grad_norm=most), updates=2)
    given = []
    part.optimizers[0].register_step_pre_hook(lambda *_: given.append(float(weight.grad.norm())))
    assert part.update()["grad_norm"] == pytest.approx(12**0.5)
    assert given == [pytest.approx(0.1 if clipped else 12**0.5, rel=1e-4)]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    accelerator = Accelerator(cpu=True)
    with whole_folder(accelerator, tmp_path / "a") as folder:
        (folder / "x").write_text("1")

    def full_disk():
        with whole_folder(accelerator, tmp_path / "a") as folder:
            (folder / "x").write_text("2")
            raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="No space left"):
        full_disk()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_another_config_is_refused_unless_allowed(tmp_path, metrics):
    train(config(tmp_path), Toy())
    other = config(tmp_path, steps=14, optimizer=optimizer(lr=2e-2))
    with pytest.raises(TrainingError, match="optimizer.lr, steps; .*-change optimizer.lr --allow-config-change steps"):
        train(other, Toy())
    train(other, Toy(options=other.optimizer), allow_change=["optimizer.lr", "steps"])
    assert metrics(tmp_path)[-1]["step"] == 14


def test_allowed_changes_of_the_optimizer_take_effect(tmp_path, metrics):
    """The rate of the update to come and all after it, and what is no rate; what Adam remembers stays."""
    train(config(tmp_path), Toy())
    options = replace(optimizer(lr=1e-5), weight_decay=0.5, muon_lr=2e-2)
    method, other = Toy(options=options), config(tmp_path, steps=14, optimizer=options)
    parts = make_parts(other, method)
    state = State(parts.values(), [average for average, _ in method.averaged()])
    state.load(newest_checkpoint(tmp_path), 0)
    adam, muon = parts["student"].optimizers
    assert adam.param_groups[0]["lr"] == pytest.approx(1e-5 * lr_factor(options, 14)(12))
    assert muon.param_groups[0]["lr"] == pytest.approx(2e-2 * lr_factor(options, 14)(12))
    assert muon.param_groups[0]["weight_decay"] == 0.5
    assert adam.state
    assert muon.state
    keys = ["optimizer.lr", "optimizer.weight_decay", "optimizer.muon_lr", "steps"]
    train(other, method, allow_change=keys)
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(1e-5 * lr_factor(options, 14)(13))


def test_a_change_that_the_checkpoint_cannot_take_is_named(tmp_path):
    train(config(tmp_path), Toy())
    without_muon = config(tmp_path, optimizer=OptimizerConfig(lr=1e-2))
    with pytest.raises(TrainingError, match=r"step-0000012 does not fit .*undo the change of optimizer"):
        train(without_muon, Toy(options=without_muon.optimizer), ["optimizer.muon_lr", "optimizer.warmup_steps"])


def test_fewer_steps_than_done_is_an_error(tmp_path):
    train(config(tmp_path), Toy())
    with pytest.raises(TrainingError, match="expected at least 12, which .* has already trained, got"):
        train(config(tmp_path, steps=5), Toy(), allow_change=["steps"])


def test_a_half_written_last_line_does_not_block_resuming(tmp_path, metrics):
    train(config(tmp_path), Toy())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    train(config(tmp_path, steps=14), Toy(), allow_change=["steps"])
    assert [m["step"] for m in metrics(tmp_path)][-2:] == [13, 14]


def test_a_run_killed_as_it_resumes_still_has_its_records(tmp_path):
    """What is kept is in the file before anything new is."""
    train(config(tmp_path), Toy())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    log = MetricLog(Accelerator(cpu=True), tmp_path, start=8)  # neither written to nor closed
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:8])
    log.close()


def test_spread_networks_go_on_in_as_many_processes(tmp_path):
    made = config(tmp_path)
    train(made, Toy())
    accelerator, state = Accelerator(cpu=True), State([], [])
    run = newest_checkpoint(tmp_path) / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "processes": 3}))
    state.sharded = True
    with pytest.raises(TrainingError, match="expected 3 processes, .*, got 1; start the run with 3"):
        resume(accelerator, state, tmp_path, made)


def test_processes_wait_for_a_long_preview_or_export(tmp_path):
    assert make_accelerator(config(tmp_path), tmp_path).init_handler.timeout == PATIENCE


def test_accumulated_losses_are_averaged(tmp_path, metrics):
    """Two micro batches: the record is their mean, and `half` is half of it."""
    train(config(tmp_path), Toy())
    rows = metrics(tmp_path)
    assert all(m["half"] == pytest.approx(m["loss"] / 2) for m in rows)
    assert all(m["other/half"] == pytest.approx(m["other/loss"] / 2) for m in rows)


def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(tmp_path, metrics):
    """Kill -9 while it trains, writes a checkpoint, has just resumed; the newest whole checkpoint carries on."""
    whole = train(config(tmp_path / "whole", steps=24), Toy())
    broken = tmp_path / "broken"
    for moment, done in (("trains", 4), ("writes a checkpoint", 8), ("starts", 8), ("trains", 12)):
        program = subprocess.run([sys.executable, str(TOY), str(broken), "24", moment], env=ENV, capture_output=True)
        assert program.returncode == -signal.SIGKILL, (moment, program.stderr)
        assert newest_checkpoint(broken).name == f"step-{done:07d}", moment
    resumed = train(config(broken, steps=24), Toy())
    assert metrics(broken) == metrics(whole.parent)
    a, b = (torch.load(folder / "ema.pt", weights_only=True) for folder in (whole, resumed))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_two_processes_give_the_numbers_of_one(tmp_path, metrics):
    one = train(config(tmp_path / "one"), Toy())
    launch(2, str(TOY), str(tmp_path / "two"), "12")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["other/loss"] == pytest.approx(b["other/loss"], abs=1e-5)
        assert a["other/half"] == pytest.approx(b["other/half"], abs=1e-5)  # of all samples, not of one process's share
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    alone, together = (torch.load(f / "ema.pt", weights_only=True) for f in (one, tmp_path / "two" / "export"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, together, strict=True))


def test_a_batch_that_cannot_be_shared_is_refused():
    assert [Share(i, 2).part(6) for i in (0, 1)] == [slice(0, 3), slice(3, 6)]
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of 2, .*, got 5"):
        Share(0, 2).part(5)


def test_checkpoints_are_saved_by_time_too(tmp_path):
    train(config(tmp_path, save_every=100, save_minutes=1e-9, keep_checkpoints=3), Toy())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{n:07d}" for n in (10, 11, 12)]


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state-00000.pt", cut),
        ("state-00000.pt", lambda path: path.write_bytes(b"")),
        ("state-00000.pt", lambda path: torch.save({"model": {}}, path)),
        ("state-00000.pt", lambda path: path.unlink()),
        ("run.json", lambda path: path.write_text("{")),
        ("run.json", lambda path: path.write_text('["no"]')),
        ("run.json", lambda path: path.write_text('{"step": 4, "processes": 1, "config": {}}')),
    ],
    ids=["cut", "empty", "foreign", "gone", "half a run.json", "foreign run.json", "run.json of another step"],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, metrics, capsys, file, damage):
    train(config(tmp_path), Toy())
    before = metrics(tmp_path)
    damage(tmp_path / "checkpoints" / "step-0000012" / file)
    train(config(tmp_path), Toy())
    said = capsys.readouterr().out
    assert "step-0000012 is damaged" in said
    assert "at step 8 of 12" in said
    assert metrics(tmp_path) == before


def test_nothing_is_started_anew_where_every_checkpoint_is_damaged(tmp_path):
    train(config(tmp_path), Toy())
    for path in tmp_path.rglob("state-*.pt"):
        cut(path)
    with pytest.raises(TrainingError, match="all checkpoints in .* are damaged; restore one"):
        train(config(tmp_path), Toy())


def test_only_what_the_run_wrote_is_removed(tmp_path):
    """Not folders of other names, not what a link leads to; leftovers of a killed run are."""
    place = tmp_path / "run" / "checkpoints"
    for name in ("step-best", "step-0000001-copy", "mine"):
        (place / name).mkdir(parents=True)
        (place / name / "run.json").write_text("{}")
    (place / ".step-0000002.removed").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run.json").write_text("{}")
    (place / "step-0000001").symlink_to(tmp_path / "elsewhere")
    train(config(tmp_path / "run"), Toy())
    names = {p.name for p in place.iterdir()}
    ours = {"step-0000008", "step-0000012"}
    assert names == {"step-best", "step-0000001-copy", "mine", "step-0000001", *ours}
    assert (tmp_path / "elsewhere" / "run.json").exists()
