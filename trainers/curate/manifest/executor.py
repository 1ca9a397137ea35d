"""Executors of tasks: this process, `workers` processes of this machine, or actors of Ray, all with the same results.

A task is a picklable function of one argument; results come back in the order of the tasks, with few of them waiting,
so memory does not grow with the number of tasks.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from ..errors import CurateError

T = TypeVar("T")
R = TypeVar("R")
EXECUTORS = ("local", "ray")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAITING_PER_WORKER = 2


class Executor(Protocol):
    """Map of a function over tasks, in order; ``close`` ends the workers. Raises CurateError if a worker dies."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]: ...

    def close(self) -> None: ...


def open_executor(name: str, workers: int) -> Executor:
    """Executor by name. Raises CurateError if Ray is not installed."""
    if name == "ray":
        return RayExecutor(workers)
    return ProcessExecutor(workers) if workers > 1 else SerialExecutor()


class SerialExecutor:
    """Executor in this process."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return map(function, tasks)

    def close(self) -> None:
        pass


class ProcessExecutor:
    """Executor of spawned processes of one thread each."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        try:
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), one_thread)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(function, task))
                if len(waiting) >= WAITING_PER_WORKER * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise CurateError(
                "a worker process died, as it does when memory is short; run the same command again with fewer workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def one_thread() -> None:
    """Set up a worker process: one thread, and Ctrl-C is for the parent."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))


class RayExecutor:
    """Actors of Ray: of a running cluster where RAY_ADDRESS is set, else of this machine.

    On fewer than four CPUs an actor takes half a CPU, since actors that take all of them leave none for Ray's tasks.
    A task is repeated at most TRIES times, so that a node without memory ends the run instead of retrying for ever.
    """

    TRIES = 2

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError:
            raise CurateError('--executor ray needs Ray; run pip install "comfyui-unipic[ray]"') from None
        self._ray: Any = ray
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            local = {} if address else {"num_cpus": max(os.cpu_count() or 1, workers), "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, configure_logging=False, **local)
        share = 0.5 if ray.cluster_resources().get("CPU", 1) < 4 else 1
        actor = ray.remote(num_cpus=share, max_restarts=self.TRIES, max_task_retries=self.TRIES)(Worker)
        self._actors = [actor.remote() for _ in range(max(1, workers))]

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        waiting: deque[Any] = deque()
        try:
            for number, task in enumerate(tasks):
                actor = self._actors[number % len(self._actors)]
                waiting.append(actor.run.remote(function, task))
                if len(waiting) >= WAITING_PER_WORKER * len(self._actors):
                    yield self._ray.get(waiting.popleft())
            while waiting:
                yield self._ray.get(waiting.popleft())
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, (ValueError, OSError)) else error from None
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())[:120]
            raise CurateError(f"a Ray worker died ({text}); run the same command again to continue") from None

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class Worker:
    """Actor of Ray that runs functions in one thread."""

    def __init__(self) -> None:
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))

    def run(self, function: Callable[[T], R], task: T) -> R:
        return function(task)
