"""Methods on endless scenes: training, exact resumes, and embeddings that a frozen encoder computes on the fly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainers.data.text_embeddings import UNCOND_PROMPT, encode_mixed
from trainers.loop.checkpointing import TrainingError
from trainers.loop.loop import train
from trainers.loop.method import Share
from trainers.methods.scenes import OnScenes
from trainers.train import make_method
from unipic_core.pipeline.text_encoder import TextEncoder

SCENES = {"kind": "scenes", "folder": "", "samples": 0, "workers": 0, "scenes": {"buffer": 16, "uses": 2}}
SECTIONS = {
    "sft": {"sft": {"train_text_encoder": False, "prompt_dropout": 0.5}},
    "consistency": {"consistency": {"guidance": 3.0, "mask": {"outside": 0.1}}},
    "dmd": {"dmd": {"fake_updates": 2, "fake_warmup_steps": 1, "optimizer": {"lr": 1e-3}}},
    "joint": {"consistency": {}, "dmd": {"fake_updates": 1, "optimizer": {"lr": 1e-3}}},
}


@pytest.fixture
def on_scenes(changed):
    def make(method, **values):
        sections = {**SECTIONS[method], "data": SCENES, "network": {"adapter": {"rank": 2, "alpha": 4.0}}}
        return changed(method, sections, steps=3, batch_size=4, **values)

    return make


@pytest.mark.parametrize("method", SECTIONS)
def test_each_method_trains_and_resumes(on_scenes, tmp_path, metrics, broken_off, method):
    config = on_scenes(method)
    made = make_method(config)
    assert isinstance(made, OnScenes)
    whole = train(config, made)
    assert metrics(config.output)[-1]["grad_norm"] > 0
    again = replace(config, output=str(tmp_path / "broken"))
    resumed = broken_off(again, make_method, made.slots + made.slots // 2)
    assert metrics(again.output) == metrics(config.output)
    (file,) = [f.name for f in whole.glob("*.safetensors") if "merged" not in f.name and "raw" not in f.name]
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def test_scenes_in_another_order_of_the_mixture_are_other_scenes(on_scenes):
    """A task is drawn by its position, so a resumed run must not go on with the same tasks in another order."""

    def with_mixture(*tasks):
        config = on_scenes("sft")
        scenes = replace(config.data.scenes, mixture=dict.fromkeys(tasks, 1.0))
        return replace(config, data=replace(config.data, scenes=scenes))

    first, same, other = with_mixture("pair", "move"), with_mixture("pair", "move"), with_mixture("move", "pair")
    train(first, make_method(first))
    train(same, make_method(same))
    with pytest.raises(TrainingError, match="other values of data.scenes.mixture;"):
        train(other, make_method(other))


def test_no_thread_encodes_while_exact_tangents_choose_the_kernel(on_scenes):
    """The choice of PyTorch's attention holds for the whole process."""
    for tangent, prefetch in (("difference", 2), ("jvp", 0)):
        config = on_scenes("consistency")
        made = make_method(replace(config, consistency=replace(config.consistency, tangent=tangent)))
        made.place(torch.device("cpu"), Share())
        assert made.prefetch == prefetch


def test_a_student_skips_no_scenes_while_it_waits(on_scenes):
    """During the fake score's warm-up the student's micro steps read no batch, so that none is lost."""
    made = make_method(on_scenes("dmd"))
    made.place(torch.device("cpu"), Share())
    assert made.updates(0) == ("fake_score", "fake_score")
    names = [made.batch(index).name for index in (0, 1, 3, 4, 5)]
    assert len(set(names)) == len(names)
    assert names == [f"scenes {', '.join(str(use.index) for use in made.stream[i])}" for i in range(5)]


def test_embeddings_of_a_batch_are_those_of_its_samples(run):
    text = TextEncoder.from_pretrained(run.network.model, dtype=torch.float32)
    rng = np.random.default_rng(0)
    sizes = [[(56, 56)], [(56, 28), (28, 56)], []]
    pictures = [[torch.from_numpy(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sample] for sample in sizes]
    prompts = ["Put the hat of image 1 on a table.", "Both.", "A long sentence about a red apple and a green one."]
    cond, uncond = encode_mixed(text, pictures, prompts)
    for texts, said in ((cond, prompts), (uncond, [UNCOND_PROMPT] * 3)):
        for i, (sample, prompt) in enumerate(zip(pictures, said, strict=True)):
            alone = encode_mixed(text, [sample], [prompt])[0].embeds
            row = texts.row(i)
            embeds = row.embeds if row.mask is None else row.embeds[row.mask][None]
            assert torch.allclose(embeds, alone, atol=1e-5)
