"""Programs in processes of their own, alone or as ranks of one run."""

import os
import socket
import subprocess
import sys

from tests.paths import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(processes, *arguments):
    """Run `python ARGUMENTS` in several processes on the CPU, as accelerate launch and torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**ENV, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    running = []
    for rank in range(processes):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        running.append(subprocess.Popen([sys.executable, *arguments], env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [one.communicate(timeout=900)[1] for one in running]
    finally:
        for one in running:  # one that failed leaves the others waiting for it
            one.kill()
    assert all(one.returncode == 0 for one in running), "\n".join(errors)
