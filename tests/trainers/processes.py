"""Programs in processes of their own, alone or as ranks of one run."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.paths import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def fork(processes, function, *arguments):
    """Call function(*arguments) in several processes on the CPU, as ranks of one run.

    They are forks of this process, so that nothing is imported again; accelerate starts anew in each.
    """
    context = multiprocessing.get_context("fork")
    environments = environments_of(processes)
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder, f"{rank}.txt") for rank in range(processes)]
        ranks = zip(environments, errors, strict=True)
        running = [context.Process(target=_as_rank, args=(env, at, function, arguments)) for env, at in ranks]
        for one in running:
            one.start()
        deadline = time.monotonic() + 600
        while any(one.is_alive() for one in running) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(one.exitcode for one in running):  # one that failed leaves the others waiting for it
                deadline = min(deadline, time.monotonic() + 5)
        for one in running:
            one.kill()
            one.join()
        texts = "\n".join(path.read_text() for path in errors if path.exists())
    assert all(one.exitcode == 0 for one in running), texts


def _as_rank(env, errors, function, arguments):
    from accelerate.state import AcceleratorState

    os.environ.update(env)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        function(*arguments)
    except BaseException:
        errors.write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def environments_of(processes):
    """The variables of each rank, as accelerate launch and torchrun set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [{**common, **rank, "WORLD_SIZE": str(processes)} for rank in ranks]


def launch(processes, *arguments):
    """Run `python ARGUMENTS` in several processes on the CPU, as accelerate launch and torchrun do."""
    running = []
    for env in environments_of(processes):
        env = {**ENV, **env}
        running.append(subprocess.Popen([sys.executable, *arguments], env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [one.communicate(timeout=900)[1] for one in running]
    finally:
        for one in running:  # one that failed leaves the others waiting for it
            one.kill()
    assert all(one.returncode == 0 for one in running), "\n".join(errors)
