"""The distillation methods in miniature: each trains, resumes bit by bit, and exports what users open."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.config.run import ConfigError, RecipeConfig
from trainers.loop.checkpointing import TrainingError
from trainers.loop.loop import train
from trainers.methods.consistency import ConsistencyTraining
from trainers.methods.dmd import DMDTraining
from trainers.methods.inputs import Draws
from trainers.methods.joint import JointTraining
from trainers.methods.losses import flow_matching_loss
from trainers.roles.types import EMA, FAKE_SCORE, STUDENT, TEACHER
from trainers.train import make_method
from unipic_core.cli import main
from unipic_core.pipeline import UniPicPipeline
from unipic_core.sampling.flow import add_noise
from unipic_core.weights.lora import read_lora
from unipic_core.weights.recipe import Recipe
from unipic_core.weights.transformer import read_config

ADAPTER = {"adapter": {"rank": 2, "alpha": 4.0}}
DROPPING = {"adapter": {**ADAPTER["adapter"], "dropout": 0.5}, "gradient_checkpointing": True}
METHODS = {"consistency": ConsistencyTraining, "dmd": DMDTraining, "joint": JointTraining}
FAST = {"dmd": {"fake_updates": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 2}}}


@pytest.fixture
def distilling(changed):
    def make(method, sections=None, network=ADAPTER, **values):
        given = {k: v for k, v in FAST.items() if k == method or method == "joint"}
        given = {**given, "network": network, **(sections or {})}
        return changed(method, given, **{"steps": 4, "optimizer": {"lr": 1e-3, "warmup_steps": 2}, **values})

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [ADAPTER, DROPPING, {}], ids=["adapters", "dropout", "full"])
def test_each_method_trains_resumes_and_exports(distilling, tmp_path, metrics, broken_off, method, network):
    config = distilling(method, network=network, output=str(tmp_path / "whole"))
    made = make_method(config)
    assert type(made) is METHODS[method]
    before = {role: [p.detach().clone() for _, p in made.roles.parameters_of(role)] for role in made.roles.names}
    whole = train(config, made)
    assert all(m["grad_norm"] > 0 for m in metrics(whole.parent))
    for role in made.roles.names:
        same = [torch.equal(a, p) for a, (_, p) in zip(before[role], made.roles.parameters_of(role), strict=True)]
        assert all(same) == (role == TEACHER), role

    config = distilling(method, network=network, output=str(tmp_path / "broken"))
    within_the_third_step = made.slots * 2 + made.slots // 2
    resumed = broken_off(config, make_method, within_the_third_step)
    assert metrics(config.output) == metrics(whole.parent)
    files = sorted(f.relative_to(whole) for f in whole.rglob("*.safetensors"))
    for file in files:
        assert (resumed / file).read_bytes() == (whole / file).read_bytes(), file


def test_what_a_distillation_leaves_opens_everywhere(distilling, run):
    export = train(distilling("consistency"), make_method(distilling("consistency")))
    made = {p.name for p in export.iterdir()}
    assert made == {
        *("unipic_distill.safetensors", "unipic_distill_merged.safetensors", "unipic_distill"),
        *("unipic_distill_raw.safetensors", "unipic_distill_raw_merged.safetensors", "unipic_distill_raw"),
    }
    recipe = read_lora(export / "unipic_distill.safetensors").recipe
    assert (recipe.steps, recipe.guidance, recipe.sampler, recipe.schedule) == (8, 1.0, "consistency", "few_step")
    pictures = [Image.new("RGB", (96, 64), "red"), Image.new("RGB", (64, 64), "blue")]
    ways = {
        "lora": UniPicPipeline.from_pretrained(run.network.model, torch_dtype=torch.float32, device="cpu"),
        "folder": UniPicPipeline.from_pretrained(export / "unipic_distill", torch_dtype=torch.float32, device="cpu"),
        "file": UniPicPipeline.from_pretrained(
            run.network.model,
            transformer=export / "unipic_distill_merged.safetensors",
            torch_dtype=torch.float32,
            device="cpu",
        ),
    }
    ways["lora"].load_lora(export / "unipic_distill.safetensors")
    latents = {k: p(images=pictures, prompt="a red cup", seed=3, output_type="latent").images for k, p in ways.items()}
    assert torch.equal(latents["folder"], latents["file"])
    assert torch.allclose(latents["lora"], latents["folder"], atol=0.05)  # the merged weights are bfloat16


def test_the_command_opens_each_of_them(distilling, run, tmp_path):
    """LoRA, file and folder, averaged and raw; the averaged ones give one picture, and another than the raw ones."""
    export = train(distilling("consistency"), make_method(distilling("consistency")))
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    made = {}
    for average in ("", "_raw"):
        name = export / f"unipic_distill{average}"
        ways = {
            "lora": ["--lora", f"{name}.safetensors"],
            "file": ["--transformer", f"{name}_merged.safetensors"],
            "folder": ["--model", str(name)],
        }
        for way, options in ways.items():
            out = tmp_path / f"{way}{average}.png"
            model = [] if "--model" in options else ["--model", str(run.network.model)]
            command = ["compose", str(tmp_path / "a.png"), "--prompt", "a cup", "--size", "64x64", "--device", "cpu"]
            assert main([*command, *model, *options, "--out", str(out)]) == 0
            made[way + average] = np.asarray(Image.open(out)).astype(int)
    for average in ("", "_raw"):
        assert (made[f"file{average}"] == made[f"folder{average}"]).all()
        assert abs(made[f"lora{average}"] - made[f"file{average}"]).max() <= 8  # the merged weights are bfloat16
    assert (made["file"] != made["file_raw"]).any()


@pytest.mark.parametrize("network", [ADAPTER, DROPPING, {}], ids=["adapters", "dropout", "full"])
def test_exact_tangents_train_too(distilling, tmp_path, metrics, network):
    """Through roles, dropout and gradient checkpointing; near those of a small difference on the same batch."""
    exact, near = ({"consistency": {"tangent": t, "e": 1e-4}} for t in ("jvp", "difference"))
    tangents = []
    for sections in (exact, near):
        config = distilling("consistency", sections, network, output=str(tmp_path / sections["consistency"]["tangent"]))
        train(config, make_method(config))
        rows = metrics(config.output)
        assert all(row["grad_norm"] > 0 for row in rows)
        tangents.append(rows[0]["tangent"])
    assert tangents[0] == pytest.approx(tangents[1], rel=0.05)


@pytest.mark.parametrize("method", ["sft", "consistency"])
@pytest.mark.parametrize("network", [ADAPTER, {}], ids=["adapters", "full"])
def test_weights_from_elsewhere_leave_whole_folders(distilling, run, tmp_path, method, network):
    """The encoder, the VAE and the rest come from the model's folder, whatever the network started from."""
    elsewhere = shutil.copytree(Path(run.network.model) / "transformer", tmp_path / "elsewhere")
    network = {**network, "transformer": str(elsewhere)}
    config = distilling(method, network=network, output=str(tmp_path / "run"), steps=1)
    export = train(config, make_method(config))
    folders = [path for path in export.iterdir() if path.is_dir()]
    assert len(folders) == 2
    for folder in folders:
        UniPicPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")


def test_a_full_student_of_a_causal_base_is_refused(distilling, run, tmp_path):
    """Its files would be read as causal, for a recipe cannot take a form back."""
    base = shutil.copytree(run.network.model, tmp_path / "base")
    (base / "recipe.json").write_text(Recipe(attention_form="prefix_causal").to_json())
    with pytest.raises(ConfigError, match="expected prefix_causal, the form of"):
        make_method(distilling("consistency", network={**ADAPTER, "model": str(base), "attention_form": "full"}))


@pytest.mark.parametrize("method", ["sft", "consistency", "dmd"])
@pytest.mark.parametrize("network", [ADAPTER, {}], ids=["adapters", "full"])
def test_a_causal_student_of_a_full_teacher(distilling, run, tmp_path, method, network):
    """It trains in its form, its teacher and fake score keep theirs, and its files bring the form along."""
    form = "prefix_causal"
    # a text encoder that trains along is in the folder alone, and the LoRA would be compared over another one
    frozen = {"sft": {"train_text_encoder": False}} if method == "sft" else {}
    config = distilling(method, frozen, {**network, "attention_form": form}, output=str(tmp_path), steps=2)
    made = make_method(config)
    forms = {role: made.roles.config_of(role).attention_form for role in made.roles.names}
    assert forms == {role: form if role in (STUDENT, EMA) else "full" for role in forms}
    export = train(config, made)
    name = f"unipic_{'sft' if method == 'sft' else 'distill'}_{form}"
    assert read_config(export / name).attention_form == form
    folder = UniPicPipeline.from_pretrained(export / name, torch_dtype=torch.float32, device="cpu")
    assert folder.transformer.config.attention_form == folder.recipe.attention_form == form
    if network is not ADAPTER:
        return
    lora = UniPicPipeline.from_pretrained(run.network.model, torch_dtype=torch.float32, device="cpu")
    lora.load_lora(export / f"{name}.safetensors")
    assert lora.transformer.config.attention_form == form
    settings = {"images": [Image.new("RGB", (96, 64), "red")], "prompt": "a cup", "seed": 3, "num_inference_steps": 2}
    latents = [pipe(**settings, output_type="latent").images for pipe in (lora, folder)]
    assert torch.allclose(*latents, atol=0.05)  # the merged weights are bfloat16
    lora.load_lora(export / f"{name}.safetensors", -1.0)
    assert lora.transformer.config.attention_form == "full"


def test_the_first_step_of_a_student_is_its_teacher(distilling):
    """Before any update all roles give the same, and distribution matching has nothing to push."""
    method = make_method(distilling("dmd", {"dmd": {"teacher_guidance": 1.0, **FAST["dmd"]}}))
    losses, extra = method.loss(STUDENT, method.batch(0).micro_batches[0])
    assert len(losses) == len(method.batch(0).micro_batches[0].rows)
    assert float(losses.detach().max()) < 1e-8
    assert extra["teacher_fake_gap"] < 1e-5


def test_parts_are_updated_in_turn_with_their_own_rates(distilling, metrics):
    sections = {"dmd": {"fake_updates": 3, "fake_warmup_steps": 2, "optimizer": {"lr": 5e-4, "warmup_steps": 0}}}
    config = distilling("dmd", sections, steps=4)
    method = make_method(config)
    assert [method.updates(step) for step in (0, 1)] == [(FAKE_SCORE,) * 3] * 2
    assert method.updates(2) == (FAKE_SCORE, FAKE_SCORE, FAKE_SCORE, STUDENT)
    train(config, method)
    rows = metrics(config.output)
    assert [row["fake_score/lr"] > 0 for row in rows] == [True] * 4
    assert rows[0]["fake_score/lr"] == pytest.approx(5e-4, rel=0.05)
    assert ["lr" in row for row in rows] == [False, False, True, True]
    assert rows[2]["lr"] == pytest.approx(5e-4)  # the first of two warm-up updates of 1e-3
    assert {"fake_score/loss", "fake_score/grad_norm"} <= set(rows[0])


def test_all_updates_of_a_step_roll_the_student_out_alike(distilling):
    """Else the fake score would learn a mean over numbers of steps, and no single one would reach the teacher."""
    method = make_method(distilling("dmd", {"dmd": {"fake_updates": 3, "max_steps": 4}}, accumulation=2))
    numbers = [{method.rollout_steps(step * 8 + i) for i in range(8)} for step in range(30)]
    assert all(len(found) == 1 for found in numbers)
    assert set.union(*numbers) == {1, 2, 3, 4}


def test_the_student_goes_on_from_a_lora(distilling, tmp_path):
    first = train(distilling("consistency", output=str(tmp_path / "first")), make_method(distilling("consistency")))
    start = {"network": {**ADAPTER, "student": str(first / "unipic_distill.safetensors")}}
    method = make_method(distilling("dmd", start))
    kept = read_lora(first / "unipic_distill.safetensors").layers
    for role in (STUDENT, EMA):
        for name, layer in method.roles.adapter(role).items():
            down, up = layer.parts["down"], layer.parts["up"]
            assert torch.allclose(down, kept[name].parts["down"].float())
            assert torch.allclose(up * 2, kept[name].parts["up"].float(), rtol=1e-2)
    assert all(not layer.parts["up"].any() for layer in method.roles.adapter(FAKE_SCORE).values())


def test_a_method_refuses_roles_that_do_not_fit(distilling):
    consistency = make_method(distilling("consistency"))
    with pytest.raises(ConfigError, match="needs the role fake_score"):
        DMDTraining(distilling("dmd"), consistency.roles)
    dmd = make_method(distilling("dmd"))
    with pytest.raises(ConfigError, match="the role fake_score must be frozen in this method, but it trains"):
        ConsistencyTraining(distilling("consistency"), dmd.roles)


def test_a_student_that_breaks_down_is_named_with_its_step(distilling):
    config = distilling("dmd")
    method = make_method(config)
    method.roles.trained(STUDENT)[0][1].data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"NaN or infinite in step 1 \(rows \d+.*checkpoint is none"):
        train(config, method)


def test_previews_are_drawn_by_the_method_s_own_sampler(distilling):
    method = make_method(distilling("consistency"))
    batch = method.batch(0).micro_batches[0]
    with torch.no_grad():
        first, again = method.sample(STUDENT, batch, seed=1), method.sample(STUDENT, batch, seed=1)
        other = method.sample(STUDENT, batch, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert Path(method.folder).is_dir()


def test_released_rollouts_cycle_with_the_student_one_step_ahead(distilling):
    """As train_dmd.py counts: (train_step // freq) % max + 1, and every freq-th train_step from 1 is the student's."""
    sections = {"dmd": {"fake_updates": 2, "max_steps": 4, "rollout": "released"}}
    method = make_method(distilling("dmd", sections))
    freq = method.slots
    theirs = [(train_step // freq) % 4 + 1 for train_step in range(1, 10 * freq + 1)]
    assert [method.rollout_steps(index) for index in range(10 * freq)] == theirs
    accumulating = make_method(distilling("dmd", sections, accumulation=2))
    assert [accumulating.rollout_steps(index) for index in range(20 * freq)] == [n for n in theirs for _ in range(2)]


@pytest.mark.parametrize(("method", "steps"), [("dmd", 3), ("joint", 3), ("consistency", 8)])
def test_the_recipe_says_the_steps_that_were_trained(distilling, method, steps):
    sections = {} if method == "consistency" else {"dmd": {"max_steps": 3}}
    assert make_method(distilling(method, sections)).student_recipe.steps == steps


def test_the_config_says_it_otherwise_and_a_finished_run_only_exports_again(distilling, tmp_path):
    export = train(config := distilling("dmd", output=str(tmp_path)), make_method(config))
    before = read_lora(export / "unipic_distill.safetensors")
    again = replace(config, recipe=RecipeConfig(steps=8, guidance=1.5))
    after = read_lora(train(again, make_method(again)) / "unipic_distill.safetensors")
    assert (before.recipe.steps, before.recipe.guidance) == (4, 1.0)
    assert after.recipe == replace(before.recipe, steps=8, guidance=1.5)
    for name, layer in before.layers.items():
        assert all(torch.equal(part, after.layers[name].parts[kind]) for kind, part in layer.parts.items()), name


def test_the_tangent_warms_up(distilling):
    """At the first update the target is the trajectory's velocity alone; after the warm-up it is as without."""
    warm = {"consistency": {"tangent_warmup": 4, "normalisation": "none", "velocity": "data", "guidance": 1.0}}
    plain = {"consistency": {**warm["consistency"], "tangent_warmup": 0}}
    method, without = (make_method(distilling("consistency", sections)) for sections in (warm, plain))
    losses = {}
    for index in (0, 2, 4):
        batch = method.batch(index).micro_batches[0]
        losses[index] = [float(m.loss(STUDENT, batch)[0].detach().mean()) for m in (method, without)]
    batch = method.batch(0).micro_batches[0]
    draws = Draws(method.config.seed, batch)
    t, eps = method.times(draws, method.options.times), draws.noise()
    with torch.no_grad():
        prediction = method.role(STUDENT, batch)(add_noise(batch.x0, eps, t), t)
        flow = flow_matching_loss(prediction, batch.x0, eps)
    assert losses[0][0] == pytest.approx(float(flow.mean()), rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)
    assert losses[2][0] != pytest.approx(losses[2][1], rel=1e-3)
    assert losses[4][0] == losses[4][1]


def test_the_warm_up_counts_the_students_updates(distilling):
    sections = {"dmd": {"fake_updates": 2, "fake_warmup_steps": 1}, "consistency": {"tangent_warmup": 4}}
    method = make_method(distilling("joint", sections, steps=4, accumulation=2))
    updates = [method.student_update(step * 6 + slot) for step in range(4) for slot in (4, 5)]
    assert updates == [0, 0, 0, 0, 1, 1, 2, 2]
