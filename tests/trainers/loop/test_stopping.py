"""Stop signals: the first saves and exits, at any moment of the loop; a second one exits at once."""

import os
import signal
import subprocess
import sys

import pytest

from tests.trainers.loop.loop_toy import Toy, config
from tests.trainers.processes import ENV
from trainers.loop import stopping
from trainers.loop.checkpointing import newest_checkpoint
from trainers.loop.loop import train
from trainers.loop.stopping import StopRequest

LAST = 11 * 3 * 2 + 5
"""Last micro step of twelve steps of three updates of two batches."""


@pytest.fixture
def not_ignored():
    """A process in the background, or under nohup, is started with some of the signals ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, signal.default_int_handler) for n in numbers if signal.getsignal(n) is signal.SIG_IGN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(tmp_path, metrics, number, not_ignored):
    class Signalled(Toy):
        def batch(self, index):
            if index == 25 and not list(tmp_path.glob("broken/checkpoints/step-0000005")):
                os.kill(os.getpid(), number)
            return super().batch(index)

    handler = signal.getsignal(number)
    train(config(tmp_path / "whole"), Toy())
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "broken"), Signalled())
    assert newest_checkpoint(tmp_path / "broken").name == "step-0000005"
    assert signal.getsignal(number) is handler
    train(config(tmp_path / "broken"), Signalled())
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def test_a_second_signal_exits_at_once():
    program = (
        "import os, signal; from trainers.loop.stopping import StopRequest\n"
        "with StopRequest() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); assert request.asked\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('went on')"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=ENV, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "went on" not in ended.stdout
    assert "a second signal exits at once" in ended.stderr


def test_a_signal_in_the_last_step_stops_before_the_export(tmp_path, metrics):
    """And before a next stage, which would go on for days after the signal."""

    class Signalled(Toy):
        def batch(self, index):
            if index == LAST and not (tmp_path / "broken" / "export").exists() and not newest_checkpoint(broken):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(index)

    broken = tmp_path / "broken"
    train(config(tmp_path / "whole"), Toy())
    with pytest.raises(KeyboardInterrupt):
        train(config(broken, save_every=100), Signalled())
    assert newest_checkpoint(broken).name == "step-0000012"
    assert not (broken / "export").exists()
    export = train(config(broken, save_every=100), Signalled())
    assert (export / "ema.pt").exists()
    assert (broken / "samples" / "step-0000012.png").exists()
    assert metrics(broken) == metrics(tmp_path / "whole")


def test_ignored_signals_stay_ignored():
    """SIGHUP under nohup, SIGINT of a shell's background jobs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_a_launcher_passes_on_is_no_second_one():
    """A scheduler signals all processes of a job; torchrun, one of them, signals its workers again."""
    program = (
        "import os, signal, time; from trainers.loop import stopping\n"
        "stopping.PASSED_ON = 0.2\n"
        "with stopping.StopRequest() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); print('went on', flush=True)\n"
        "    time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM); print('and on')"
    )
    env = {**ENV, stopping.LAUNCHER: "none"}
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == "went on\n"
