"""Endless scenes: a function of seed and index, used with other words each time, with the owner of every token."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from trainers.config.run import ConfigError, DataConfig, RunConfig, ScenesConfig
from trainers.data.endless.drawing import draw_scene
from trainers.data.endless.stream import SceneStream, SceneUse
from trainers.data.endless.token_sources import AMBIGUOUS, owners_of
from trainers.data.endless.workers import SceneWorkers
from trainers.methods.correspondence import NOBODY
from trainers.methods.scenes import owners_of as references_of
from trainers.nano.emoji import SUBSET, Bank
from trainers.nano.render import render
from trainers.nano.scenes import EDITS, make_scene
from unipic_core.errors import UniPicError

DATA = DataConfig(kind="scenes", seed=3, size=64, reference_budget=64, workers=0, scenes=ScenesConfig(buffer=16))


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.open(SUBSET)


@pytest.fixture(scope="module")
def vae(run: RunConfig) -> Path:
    assert run.network is not None
    return Path(run.network.model) / "vae"


def contents(batch: list[SceneUse]) -> list[tuple[object, ...]]:
    return [(use.index, use.scene, use.encoded.target.tobytes(), use.encoded.owners.tobytes()) for use in batch]


def test_batches_are_a_function_of_seed_and_step(vae: Path) -> None:
    stream = SceneStream(DATA, 4, seed=1, vae_folder=vae)
    first = [contents(stream[i]) for i in range(9)]
    later = SceneStream(DATA, 4, seed=1, vae_folder=vae)
    assert [contents(later[i]) for i in (8, 6, 3)] == [first[i] for i in (8, 6, 3)]
    other = SceneStream(replace(DATA, seed=4), 4, seed=1, vae_folder=vae)
    assert contents(other[0]) != first[0]


def test_worker_processes_draw_the_same(vae: Path) -> None:
    here, there = (SceneStream(replace(DATA, workers=n), 8, seed=1, vae_folder=vae) for n in (0, 1))
    for i in (0, 4):
        assert contents(there[i]) == contents(here[i])
    there.close()


@pytest.fixture
def working(vae: Path) -> Iterator[tuple[SceneWorkers, BaseProcess]]:
    """Workers of one process that has drawn, and that process."""
    others = multiprocessing.active_children()
    workers = SceneWorkers(replace(DATA, workers=1), vae)
    workers.collect(range(1))
    [process] = [child for child in multiprocessing.active_children() if child not in others]
    yield workers, process
    workers.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
def test_ctrl_c_leaves_the_workers_alone_and_a_dead_one_is_reported(
    working: tuple[SceneWorkers, BaseProcess],
) -> None:
    """A terminal sends SIGINT to all processes; the training still needs scenes for the step that it ends."""
    workers, process = working
    assert process.pid is not None
    workers.request(range(1, 3))
    os.kill(process.pid, signal.SIGINT)
    assert len(workers.collect(range(1, 2))) == 16
    process.kill()
    for _ in range(2):
        with pytest.raises(UniPicError, match="a process that draws scenes has died"):
            workers.collect(range(2, 3))


def test_closed_workers_leave_nothing_running(working: tuple[SceneWorkers, BaseProcess]) -> None:
    workers, process = working
    workers.request(range(1, 40))
    workers.close()
    assert wait([process.sentinel], timeout=120)  # the pool joins it itself: a second join may miss its end


def test_what_fails_in_a_worker_fails_in_the_training(tmp_path: Path) -> None:
    workers = SceneWorkers(replace(DATA, workers=1), tmp_path / "no vae")
    with pytest.raises(UniPicError, match="no vae"):
        workers.collect(range(1))
    workers.close()


def test_every_scene_is_used_as_often_as_asked_with_other_words(vae: Path) -> None:
    stream = SceneStream(DATA, 4, seed=1, vae_folder=vae)
    uses = [use for i in range(8) for use in stream[i]]
    assert Counter(use.index for use in uses) == dict.fromkeys(range(16), 2)
    for index in range(16):
        first, second = (use.scene for use in uses if use.index == index)
        assert (first.items, first.background) == (second.items, second.background)
        assert (first.order, first.instruction) != (second.order, second.instruction)
    assert all(len({use.index for use in stream[i]}) == 4 for i in range(8))
    assert {use.index for use in stream[8]} <= set(range(16, 32))


def test_owners_become_references_of_the_new_order(vae: Path) -> None:
    """The token of an item is owned by the reference whose picture is the item's, whatever the order of this use."""
    uses = SceneStream(DATA, 8, seed=1, vae_folder=vae)[0]
    owners = references_of(uses)
    for b, use in enumerate(uses):
        for token, source in enumerate(use.encoded.owners.tolist()):
            expected = NOBODY if source == AMBIGUOUS else use.scene.reference_of(source)
            assert owners.references[b, token] == expected
        assert owners.background[b] == (NOBODY if use.scene.edit else use.scene.reference_of(len(use.scene.items)))


def test_owners_are_what_the_masks_show(bank: Bank) -> None:
    for index in range(12):
        scene = make_scene(bank, "train", 5, index)
        sample = render(bank, scene)
        owners = owners_of(scene, sample)
        if scene.task in EDITS:
            assert set(owners) == {AMBIGUOUS}
            continue
        for token, owner in enumerate(owners):
            row, column = (16 * at for at in divmod(token, 8))
            shares = [p.mask[row : row + 16, column : column + 16].mean() for p in sample.placements]
            shares.append(1 - sum(shares))
            if owner != AMBIGUOUS:
                assert np.argmax(shares) == owner
            else:
                assert max(shares) < 0.85
        assert len(scene.items) in owners


def test_the_mixture_says_how_often_a_task_comes(bank: Bank) -> None:
    tasks = Counter(draw_scene(bank, 1, i, 64, {"pair": 3.0, "compose4": 1.0}).task for i in range(200))
    assert set(tasks) == {"pair", "compose4"}
    assert 0.6 < tasks["pair"] / 200 < 0.9


def test_a_buffer_that_leaves_a_rest_is_refused(vae: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of batch_size"):
        SceneStream(replace(DATA, scenes=ScenesConfig(buffer=24)), 4, seed=1, vae_folder=vae)


def test_unknown_tasks_are_refused_before_they_are_drawn(vae: Path) -> None:
    scenes = ScenesConfig({"pair": 1.0, "open_side": 1.0, "choose": 1.0, "plain_4": 0.001}, buffer=16)
    with pytest.raises(ConfigError, match=r"data.scenes.mixture: expected tasks of .*plain_four, got plain_4"):
        SceneStream(replace(DATA, scenes=scenes), 4, seed=1, vae_folder=vae)


def test_unknown_tasks_are_named(bank: Bank) -> None:
    with pytest.raises(ValueError, match="compose9"):
        draw_scene(bank, 1, 0, 64, {"compose9": 1.0})


def test_open_scenes_come_by_their_share_and_a_named_place_owns_no_token(vae: Path, bank: Bank) -> None:
    mixture = {"open_background": 1.0, "open_side": 1.0}
    uses = SceneStream(replace(DATA, scenes=ScenesConfig(mixture, buffer=16)), 16, seed=1, vae_folder=vae)[0]
    assert {use.scene.task for use in uses} == set(mixture)
    owners = references_of(uses)
    for b, use in enumerate(uses):
        named = use.scene.task == "open_background"
        assert (owners.background[b] == NOBODY) == named
        assert (len(use.scene.items) in use.encoded.owners) != named
        assert set(owners.references[b].tolist()) <= {NOBODY, *range(len(use.places))}


def test_targets_of_other_shapes_share_a_batch_with_their_like(vae: Path) -> None:
    data = replace(DATA, scenes=ScenesConfig(buffer=64, shapes={"1x1": 1.0, "1x2": 1.0, "2x1": 1.0}))
    stream = SceneStream(data, 8, seed=1, vae_folder=vae)
    batches = [stream[i] for i in range(24)]
    shapes = [{use.encoded.target.shape[1:] for use in batch} for batch in batches]
    assert all(len(one) == 1 for one in shapes)
    assert {shape for one in shapes for shape in one} == {(8, 8), (4, 12), (12, 4)}
    for batch in batches[:4]:
        for use in batch:
            high, wide = use.encoded.target.shape[1:]
            assert len(use.encoded.owners) == high * wide // 4


def test_square_batches_are_what_they_were_before_there_were_shapes(vae: Path) -> None:
    square = replace(DATA, scenes=ScenesConfig(buffer=32, shapes={"1x1": 1.0}))
    plain = replace(DATA, scenes=ScenesConfig(buffer=32))
    first, second = (SceneStream(data, 8, seed=1, vae_folder=vae) for data in (square, plain))
    assert contents(first[5]) == contents(second[5])


@pytest.mark.parametrize(("batch", "buffer"), [(24, 48), (16, 48)])
def test_batches_that_would_mix_shapes_are_refused(vae: Path, batch: int, buffer: int) -> None:
    data = replace(DATA, scenes=ScenesConfig(buffer=buffer, shapes={"1x1": 1.0, "1x2": 1.0}))
    with pytest.raises(ConfigError, match=r"data\.scenes\.shapes"):
        SceneStream(data, batch, seed=1, vae_folder=vae)


@pytest.mark.parametrize("shape", ["1x3", "3:4", "0x1", "wide"])
def test_shapes_beyond_two_to_one_are_refused(shape: str) -> None:
    with pytest.raises(ConfigError, match="1x2 to 2x1"):
        ScenesConfig(shapes={shape: 1.0})
