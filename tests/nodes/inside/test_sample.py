"""The samplers, schedules and guidance inside ComfyUI's own sampling, on networks whose answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
import toy
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from comfyui import CASES
from safetensors.torch import load_file
from torch import Tensor
from unipic_pack.nodes import sample
from unipic_pack.nodes.host.model.loading import load_model
from unipic_pack.nodes.host.recipe_attachment import RecipeAttachment, attach, attachment_of
from unipic_pack.nodes.host.sampling.guidance import guide, with_guidance
from unipic_pack.nodes.host.sampling.samplers import ksampler, seeded_noise
from unipic_pack.nodes.host.sampling.schedules import sigmas_of, target_tokens
from unipic_pack.unipic_core.conditioning.sequence import LatentShape, pack_latents, unpack_latents
from unipic_pack.unipic_core.errors import UniPicError
from unipic_pack.unipic_core.run.plan import resolve
from unipic_pack.unipic_core.sampling.guidance import apply_guidance
from unipic_pack.unipic_core.sampling.schedules import Shift, base_times, few_step_times
from unipic_pack.unipic_core.weights.recipe import RELEASED_BASE, RELEASED_FEW_STEP, Recipe


def sigmas(attached: RecipeAttachment, steps: int | None, tokens: int, denoise: float = 1.0) -> Tensor:
    """The times of a model with this recipe."""
    return sigmas_of(resolve(attached.recipe, steps), attached.shift, tokens, denoise)


FEW = sigmas(RecipeAttachment(RELEASED_FEW_STEP), 4, 24)
CONSISTENCY, EULER = ksampler("consistency"), ksampler("euler")


def with_recipe(patcher: Any, recipe: Recipe = RELEASED_FEW_STEP, shift: Shift = Shift()) -> Any:
    attach(patcher, RecipeAttachment(recipe, shift))
    return patcher


def few_step(patcher: Any, latent: dict[str, Any], **more: Any) -> dict[str, Any]:
    """FewStepSampler with the inputs that a test does not name left at their defaults."""
    values = {"seed": 7, "steps": 0, "cfg": 0.0, "sampler": "auto", "denoise": 1.0, **more}
    return sample.FewStepSampler.execute(patcher, toy.text(0.3), toy.text(-0.2), latent, **values)[0]


# --- samplers ---


@pytest.mark.parametrize("sampler", [CONSISTENCY, EULER], ids=["consistency", "euler"])
def test_one_step_of_the_exact_flow_map(sampler: Any) -> None:
    noise = toy.start()
    out = toy.run(toy.model(toy.gaussian), sampler, torch.tensor([1.0, 0.0]), noise)
    toy.close(out, toy.MEAN + toy.STD * noise, 1e-6)


def test_consistency_steps_land_on_the_data() -> None:
    noise = toy.start(height=64, width=64)
    out = toy.run(toy.model(toy.gaussian), CONSISTENCY, FEW, noise)
    assert float(out.mean()) == pytest.approx(toy.MEAN, abs=0.01)
    assert float(out.std()) == pytest.approx(toy.STD, abs=0.01)
    assert float((out - (toy.MEAN + toy.STD * noise)).abs().max()) > 0.1  # fresh noise, not the first one again


def test_euler_is_comfyuis_euler() -> None:
    model, noise = toy.model(), toy.start(2)
    toy.close(toy.run(model, EULER, FEW, noise), toy.run(model, comfy.samplers.ksampler("euler"), FEW, noise), 2e-6)


@pytest.mark.parametrize("seed", [0, 7, 2**63])
def test_consistency_is_comfyuis_lcm_to_the_bit(seed: int) -> None:
    model, noise = toy.model(), toy.start(seed=seed)
    lcm = toy.run(model, comfy.samplers.ksampler("lcm"), FEW, noise, seed=seed)
    toy.close(toy.run(model, CONSISTENCY, FEW, noise, seed=seed), lcm)


def test_the_largest_seed() -> None:
    out = few_step(with_recipe(toy.model()), toy.latent(2), seed=0xFFFFFFFFFFFFFFFF)["samples"]
    assert bool(torch.isfinite(out).all())


def test_given_step_noise_is_what_is_added() -> None:
    model, noise = toy.model(), toy.start(2)
    extra = [torch.randn(noise.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    x = noise
    for i, (t, t_next) in enumerate(pairwise(FEW.tolist())):
        x0 = x - t * toy.textual(x, torch.tensor(t), torch.full((1, 3, 8), 0.3))
        x = (1 - t_next) * x0 + t_next * extra[i] if t_next else x0
    toy.close(toy.run(model, ksampler("consistency", step_noise=extra), FEW, noise), x, 1e-5)


@pytest.mark.parametrize("bad", [[], [torch.zeros(2, 4, 1, 8, 8)] * 3])
def test_step_noise_that_does_not_fit(bad: list[Tensor]) -> None:
    with pytest.raises(UniPicError, match=r"step_noise must hold noise of shape \[1, 4, 1, 8, 12\] for step 1"):
        toy.run(toy.model(), ksampler("consistency", step_noise=bad), FEW, toy.start())


@pytest.mark.parametrize("name", ["lcm", None, []])
def test_a_sampler_of_another_name(name: Any) -> None:
    with pytest.raises(UniPicError, match="the sampler must be one of consistency, euler, got "):
        sample.UniPicSamplerSelect.execute(name)


def test_split_sigmas_go_on_where_they_stopped() -> None:
    """As SamplerCustomAdvanced with SplitSigmas runs it: the second half begins without noise."""
    model, noise = toy.model(), toy.start()
    half = toy.run(model, EULER, FEW[:3], noise)
    rest = toy.run(model, EULER, FEW[2:], torch.zeros_like(noise), half)
    toy.close(rest, toy.run(model, EULER, FEW, noise), 1e-5)


def test_sigmas_of_another_kind_of_model() -> None:
    with pytest.raises(UniPicError, match=r"fall from at most 1 to 0, got 14\.6, 1, 0; take them from UniPic Sigmas"):
        toy.run(toy.model(), EULER, torch.tensor([14.6, 1.0, 0.0]), toy.start())


@pytest.mark.parametrize("sampler", [CONSISTENCY, EULER], ids=["consistency", "euler"])
@pytest.mark.parametrize("bad", [[math.nan, 0.5, 0.0], [1.0, math.nan, 0.0], [1.0, 0.5, math.nan], [0.5, 0.2, -0.1]])
def test_sigmas_that_are_no_times(sampler: Any, bad: list[float]) -> None:
    with pytest.raises(UniPicError, match="fall from at most 1 to 0, got .*; take them from UniPic Sigmas"):
        toy.run(toy.model(), sampler, torch.tensor(bad), toy.start())


def test_the_consistency_sampler_wants_falling_sigmas() -> None:
    """FlipSigmas writes 0.0001 in the place of 0."""
    for rising in ([1e-4, *FEW.flip(0).tolist()[1:]], [0.2, 0.5, 1.0], [1.0, 0.5, 0.7, 0.0]):
        with pytest.raises(UniPicError, match="fall from at most 1 to 0, got .*, or choose euler"):
            toy.run(toy.model(), CONSISTENCY, torch.tensor(rising), toy.start())


def test_euler_inverts_with_rising_sigmas() -> None:
    """From a picture up the flow, and down again to the picture."""
    model, picture = toy.model(), toy.start()
    none, up = torch.zeros_like(picture), torch.linspace(1e-4, 0.9, 401)
    inverted = toy.run(model, EULER, up, none, picture)
    toy.close(toy.run(model, EULER, up.flip(0), none, inverted), picture, 0.05)
    with pytest.raises(UniPicError, match="got 0.0001, 0.5, 1; to invert a picture with euler, let them rise to 0.999"):
        toy.run(model, EULER, torch.tensor([1e-4, 0.5, 1.0]), none, picture)


# --- golden numbers ---


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Any:
    return load_model(golden / "tiny")


@pytest.mark.parametrize("name", CASES)
def test_golden_latents_after_every_step(name: str, golden: Path, tiny: Any) -> None:
    folder = golden / "cases" / name
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")
    settings = resolve(Recipe(), case["steps"], case["true_cfg_scale"], case["sampler"])
    shape = LatentShape.of_pixels(case["width"], case["height"])
    sigmas = sigmas_of(settings, attachment_of(tiny).shift, shape.num_tokens)
    toy.close(sigmas, tensors["times"].float(), 1e-6)

    references = [
        tiny.model.process_latent_out(tensors[f"reference_latent_{i + 1}"]) for i in range(len(case["reference_sizes"]))
    ]
    conds = [[[tensors[f"{kind}prompt_embeds"], {"reference_latents": references}]] for kind in ("", "negative_")]
    noise = unpack_latents(tensors["noise"], shape)
    options = {}
    if case["sampler"] == "consistency":
        given = [unpack_latents(tensors[f"step_noise_{i + 1}"], shape) for i in range(case["steps"])]
        options["step_noise"] = given
    reached: list[Tensor] = []
    out = comfy.sample.sample_custom(
        with_guidance(tiny),
        noise,
        settings.guidance,
        ksampler(settings.sampler, **options),
        sigmas,
        *conds,
        torch.zeros_like(noise),
        callback=lambda i, x0, x, total: reached.append(x),
        disable_pbar=True,
        seed=0,
    )
    reached = [*reached[1:], tiny.model.process_latent_in(out)]
    worst = [
        float((pack_latents(x) - tensors[f"latents_after_step_{i + 1}"]).abs().max()) for i, x in enumerate(reached)
    ]
    print(f"{name}: at most {max(worst):.1e}")
    assert len(worst) == case["steps"]
    assert max(worst) < 1e-4


# --- progress, interruption, NaN ---


@pytest.mark.parametrize("name", ["consistency", "euler"])
def test_callback_gets_what_comfyuis_samplers_give(name: str) -> None:
    model, noise = toy.model(), toy.start()
    seen: dict[str, list[Any]] = {}
    for kind, sampler in (("ours", ksampler(name)), ("theirs", comfy.samplers.ksampler(STOCK[name]))):
        steps = seen[kind] = []
        toy.run(model, sampler, FEW, noise, callback=lambda *values, to=steps: to.append(values))
    assert [(i, total) for i, _, _, total in seen["ours"]] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for (_, x0, x, _), (_, want_x0, want_x, _) in zip(seen["ours"], seen["theirs"], strict=True):
        toy.close(x0, want_x0, 2e-6)
        toy.close(x, want_x, 2e-6)


STOCK = {"consistency": "lcm", "euler": "euler"}


@pytest.mark.parametrize("name", ["consistency", "euler"])
def test_interruption_stops_before_the_next_step_and_the_next_run_works(name: str) -> None:
    model, noise = toy.model(), toy.start()

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        toy.run(model, ksampler(name), FEW, noise, callback=stop)
    assert len(toy.network(model).calls) == 2
    assert bool(torch.isfinite(toy.run(model, ksampler(name), FEW, noise)).all())


@pytest.mark.parametrize("name", ["consistency", "euler"])
def test_nan_names_the_step_and_what_to_try(name: str) -> None:
    def breaks(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x / 0 if float(t.flatten()[0]) < float(FEW[2]) + 0.01 else x

    with pytest.raises(
        UniPicError, match=r"NaN or infinite in step 3; load the model as bf16.*ComfyUI without"
    ) as error:
        toy.run(toy.model(breaks), ksampler(name), FEW, toy.start())
    assert "unipic info" not in str(error.value)


# --- seeds and batches ---


def test_one_seed_gives_one_picture() -> None:
    model = with_recipe(toy.model())
    first = few_step(model, toy.latent())["samples"]
    toy.close(few_step(model, toy.latent())["samples"], first)
    assert float((few_step(model, toy.latent(), seed=8)["samples"] - first).abs().max()) > 0.1


def test_a_picture_of_a_batch_comes_again_alone_by_its_batch_index() -> None:
    model = with_recipe(toy.model())
    batch = few_step(model, toy.latent(3))["samples"]
    assert float((batch[0] - batch[1]).abs().max()) > 0.1
    for i in range(3):
        toy.close(few_step(model, toy.latent(1, batch_index=[i]))["samples"], batch[i : i + 1])
    toy.close(few_step(model, toy.latent())["samples"], batch[:1])


def test_renoising_depends_on_seed_step_and_picture_alone() -> None:
    x = toy.start(3)
    whole, last = seeded_noise(x, 5), seeded_noise(x[:1], 5, [2])
    drawn = [whole(step) for step in range(3)]
    for step in range(3):
        toy.close(last(step), drawn[step][2:])
    every = torch.cat([n.reshape(3, -1) for n in drawn])
    assert float(torch.corrcoef(every).fill_diagonal_(0).abs().max()) < 0.25
    stock = comfy.k_diffusion.sampling.default_noise_sampler(x[:1], seed=5)
    toy.close(torch.cat([stock(1.0, 0.5), stock(0.5, 0.2)]), torch.cat([drawn[0][:1], drawn[1][:1]]))


# --- masks ---


@pytest.mark.parametrize("name", ["consistency", "euler"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_the_masked_part_of_the_latent_stays(name: str, denoise: float) -> None:
    model = with_recipe(toy.model())
    before = torch.randn(1, 4, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 8, 12)
    mask[..., 6:] = 1
    latent = {"samples": before, "noise_mask": mask}
    out = few_step(model, latent, sampler=name, denoise=denoise)
    toy.close(out["samples"][..., :6], before[..., :6], 1e-6)
    assert float((out["samples"] - before)[..., 6:].abs().max()) > 0.1
    assert out["noise_mask"] is mask
    start = comfy.sample.prepare_noise(before, 7)
    for x, t in toy.network(model).calls:  # the network sees the unmasked part with one noise, at the right time
        toy.close(x[..., :6], ((1 - t) * before + t * start)[..., :6], 1e-6)


def test_the_masked_part_is_what_lcm_gives() -> None:
    model, noise = toy.model(), toy.start()
    before = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    mask = torch.rand(1, 8, 12, generator=torch.Generator().manual_seed(4))
    lcm = toy.run(model, comfy.samplers.ksampler("lcm"), FEW, noise, before, noise_mask=mask)
    toy.close(toy.run(model, CONSISTENCY, FEW, noise, before, noise_mask=mask), lcm)


@pytest.mark.parametrize("form", ["BHW", "B1HW", "B11HW"])
def test_each_picture_of_a_batch_has_its_own_mask(form: str) -> None:
    """Pixels' masks, as Load Image and Set Latent Noise Mask give them."""
    before = torch.randn(3, 4, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    left = torch.zeros(64, 96)
    left[:, :48] = 1
    masks = torch.stack([left, 1 - left, left])
    shaped = {"BHW": masks, "B1HW": masks[:, None], "B11HW": masks[:, None, None]}[form]
    out = few_step(with_recipe(toy.model()), {"samples": before, "noise_mask": shaped})["samples"]
    changed = (out - before).abs() > 1e-5
    for picture, half in enumerate((slice(0, 6), slice(6, 12), slice(0, 6))):
        assert bool(changed[picture, ..., half].all())
        assert int(changed[picture].sum()) == changed[picture, ..., half].numel()


def test_masks_that_do_not_fit_the_batch() -> None:
    model, samples = with_recipe(toy.model()), torch.zeros(3, 4, 1, 8, 12)
    one = few_step(model, {"samples": samples, "noise_mask": torch.ones(64, 96)})
    toy.close(one["samples"], few_step(model, {"samples": samples})["samples"], 1e-6)
    with pytest.raises(UniPicError, match="must have one mask, or one for each of its 3 pictures, got 2"):
        few_step(model, {"samples": samples, "noise_mask": torch.ones(2, 64, 96)})
    with pytest.raises(UniPicError, match="mask must hold numbers from 0 to 1, got NaN"):
        few_step(model, {"samples": samples, "noise_mask": torch.full((1, 64, 96), math.nan)})


# --- schedules ---


def test_sigmas_are_the_cores() -> None:
    shift = Shift(base_mu=0.2, max_mu=1.4)
    few = sigmas(RecipeAttachment(RELEASED_FEW_STEP, shift), None, 100)
    assert few.dtype == torch.float32
    toy.close(few.double(), few_step_times(8, 100, shift), 1e-7)
    stock = sigmas(RecipeAttachment(), 6, 4096)  # a model that our loader did not make
    toy.close(stock.double(), base_times(6, 4096), 1e-7)
    assert len(sigmas(RecipeAttachment(), None, 4096)) == 51
    assert float(few[0]) == 1
    assert float(few[-1]) == 0


def test_denoise_is_the_tail_of_a_longer_schedule() -> None:
    attached = RecipeAttachment(RELEASED_FEW_STEP)
    toy.close(sigmas(attached, 4, 24, 0.5), sigmas(attached, 8, 24)[-5:])
    toy.close(sigmas(attached, 8, 24, 0.8), sigmas(attached, 10, 24)[-9:])
    toy.close(sigmas(attached, 3, 24, 0.99), sigmas(attached, 3, 24))  # as KSampler: int(3 / 0.99) is 3
    before = torch.randn(1, 4, 1, 8, 12, generator=torch.Generator().manual_seed(3))
    out = few_step(with_recipe(toy.model()), {"samples": before}, denoise=0.0)["samples"]
    toy.close(out, before)


@pytest.mark.parametrize(("height", "width", "tokens"), [(8, 12, 24), (7, 12, 24), (9, 11, 30)])
def test_target_tokens(height: int, width: int, tokens: int) -> None:
    assert target_tokens(torch.zeros(1, 4, 1, height, width)) == tokens


# --- guidance ---


def test_guidance_is_the_cores_per_token() -> None:
    model, noise = toy.model(), toy.start(2)
    t = torch.full((2, 1, 1, 1, 1), 0.7)
    c, u = (pack_latents(toy.textual(noise, t, torch.full((1, 3, 8), value))) for value in (0.3, -0.2))
    want = noise - 0.7 * unpack_latents(apply_guidance(c, u, 4.0), LatentShape(1, 4, 6))
    seen = []
    guided = with_guidance(model)
    sigmas = torch.tensor([0.7, 0.0])
    toy.run(guided, EULER, sigmas, noise, cfg=4.0, latent=noise, callback=lambda _, x0, *more: seen.append(x0))
    toy.close(seen[0], want, 1e-5)
    assert "sampler_cfg_function" not in model.model_options
    plain = toy.run(model, EULER, sigmas, noise, cfg=4.0, latent=noise)
    assert float((plain - want).abs().max()) > 0.01  # ComfyUI's own guidance is another


def test_guidance_fills_odd_sizes() -> None:
    cond, uncond = torch.randn(2, 1, 4, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    args = {"cond": cond, "uncond": uncond, "cond_scale": 3.0, "sigma": torch.tensor([0.5])}
    got = guide(args)
    even = guide({**args, "cond": cond[..., :6, :8], "uncond": uncond[..., :6, :8]})
    toy.close(got[..., :6, :8], even, 1e-6)
    toy.close(got[..., 6, 8].norm(), cond[..., 6, 8].norm(), 1e-5)  # a token of one pixel keeps its norm


def test_guidance_of_the_user_is_kept() -> None:
    model = toy.model()
    model.set_model_sampler_cfg_function(lambda args: args["uncond"])
    toy.close(
        toy.run(with_guidance(model), EULER, FEW, toy.start(), cfg=4.0),
        toy.run(model, EULER, FEW, toy.start(), cfg=4.0),
    )


def test_guidance_one_is_one_pass_a_step() -> None:
    model = with_recipe(toy.model())
    few_step(model, toy.latent())
    assert [len(x) for x, _ in toy.network(model).calls] == [1] * 8
    toy.network(model).calls.clear()
    few_step(model, toy.latent(), cfg=4.0)
    assert sum(len(x) for x, _ in toy.network(model).calls) == 16


def test_guidance_function_at_one_without_the_second_pass() -> None:
    model, noise = toy.model(), toy.start()
    toy.close(toy.run(with_guidance(model), EULER, FEW, noise), toy.run(model, EULER, FEW, noise))


# --- nodes ---


@pytest.mark.parametrize(
    ("recipe", "inputs", "line"),
    [
        (RELEASED_FEW_STEP, {}, "8 steps, consistency, no guidance"),
        (RELEASED_FEW_STEP, {"steps": 3, "cfg": 2.5}, "3 steps, consistency, guidance 2.5"),
        (Recipe(steps=4, guidance=1.0, sampler="euler", schedule="few_step"), {}, "4 steps, euler, no guidance"),
        (Recipe(), {}, "50 steps, euler, guidance 4"),
        (Recipe(), {"sampler": "consistency"}, "8 steps, consistency, no guidance"),
    ],
)
def test_recipe_and_inputs(recipe: Recipe, inputs: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    model = with_recipe(toy.model(), recipe)
    with caplog.at_level("INFO"):
        few_step(model, toy.latent(), **inputs)
    assert line in caplog.text
    assert ("no recipe: " in caplog.text) == (recipe == Recipe())
    assert len(toy.network(model).calls) == int(line.split()[0])


def test_a_model_without_a_recipe_runs_with_the_releases_defaults(caplog: pytest.LogCaptureFixture) -> None:
    model = toy.model()
    with caplog.at_level("INFO"):
        few_step(model, toy.latent(), steps=2)
    assert "Few-Step Sampler (UniPic): no recipe: 2 steps, euler, guidance 4" in caplog.text
    times = [float(t[0]) for _, t in toy.network(model).calls]
    assert times == pytest.approx(base_times(2, 24)[:-1].tolist(), abs=1e-6)


def test_a_schedule_may_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    """euler with the schedule base on few-step weights is the release's demo: diffusers' times with their stretch."""
    model = with_recipe(toy.model())
    with caplog.at_level("INFO"):
        few_step(model, toy.latent(), sampler="euler")
    told = "8 steps, euler, no guidance, schedule few_step; the release's demo of few-step weights with euler has"
    assert told in caplog.text
    for chosen, times in (("few_step", few_step_times(4, 24)), ("base", base_times(4, 24))):
        toy.network(model).calls.clear()
        few_step(model, toy.latent(), steps=4, sampler="euler", schedule=chosen)
        assert [float(t[0]) for _, t in toy.network(model).calls] == pytest.approx(times[:-1].tolist(), abs=1e-6)
        given = sample.UniPicSigmas.execute(model, toy.latent(), 4, 1.0, chosen)[0]
        toy.close(given, times.float(), 1e-6)
    linear = sample.UniPicSigmas.execute(model, toy.latent(), 4, 1.0, "fixed_shift", 3.0)[0]
    toy.close(linear, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), 1e-6)
    with pytest.raises(UniPicError, match="a shift needs the schedule fixed_shift, got the schedule few_step"):
        few_step(model, toy.latent(), shift=3.0)


def test_a_chosen_shift_wins_over_a_sampling_node(caplog: pytest.LogCaptureFixture) -> None:
    [model] = ModelSamplingAuraFlow().patch_aura(with_recipe(toy.model(), RELEASED_BASE), 5.0)
    with caplog.at_level("INFO"):
        given = sample.UniPicSigmas.execute(model, toy.latent(), 2, 1.0, "fixed_shift", 3.0)[0]
    toy.close(given, torch.tensor([1.0, 0.75, 0.0]), 1e-6)
    assert "the ModelSampling node's shift 5 is ignored: a shift was chosen" in caplog.text


def test_a_latent_over_the_budget_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The toy's latents are an eighth of the picture."""
    model = with_recipe(toy.model(), replace(RELEASED_FEW_STEP, output_budget=48))
    with caplog.at_level("INFO"):
        few_step(model, toy.latent())
    assert "96x64 is over this model's 48x48 pixels" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        few_step(with_recipe(toy.model(), replace(RELEASED_FEW_STEP, output_budget=96)), toy.latent())
        few_step(with_recipe(toy.model(), replace(RELEASED_FEW_STEP, output_budget=None)), toy.latent())
    assert "is over" not in caplog.text


def test_few_step_sampler_is_lcm_with_our_sigmas() -> None:
    model, latent = with_recipe(toy.model()), toy.latent()
    sigmas = sample.UniPicSigmas.execute(model, latent, steps=0, denoise=1.0)[0]
    lcm = toy.run(model, comfy.samplers.ksampler("lcm"), sigmas, toy.start(), seed=7)
    toy.close(few_step(model, latent)["samples"], lcm)
    select = sample.UniPicSamplerSelect.execute("consistency")[0]
    toy.close(toy.run(model, select, sigmas, toy.start(), seed=7), lcm)


def test_an_empty_latent_of_comfyuis_gets_the_models_channels() -> None:
    model = with_recipe(toy.model())
    out = few_step(model, {"samples": torch.zeros(1, 16, 8, 12), "downscale_ratio_spacial": 8})
    toy.close(out["samples"], few_step(model, toy.latent())["samples"])
    assert set(out) == {"samples"}


@pytest.mark.parametrize("samples", [torch.ones(1, 16, 1, 8, 8), torch.ones(1, 4, 3, 8, 8)])
def test_latents_of_another_kind(samples: Tensor) -> None:
    with pytest.raises(UniPicError, match=r"expects a latent \[batch, 4, 1, height, width\], got \[1, "):
        few_step(with_recipe(toy.model()), {"samples": samples})


def test_a_model_of_another_kind() -> None:
    model = toy.model()
    model.add_object_patch("model_sampling", comfy.model_sampling.ModelSamplingDiscrete())
    with pytest.raises(UniPicError, match="expected a flow model such as UniPic"):
        sample.UniPicSigmas.execute(model, toy.latent(), steps=4, denoise=1.0)


def test_previews_reach_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: seen.append(values))
    few_step(with_recipe(toy.model()), toy.latent())
    assert [(value, total) for value, total, *_ in seen] == [(i + 1, 8) for i in range(8)]
    assert all(preview[1].size == (12, 8) for _, _, preview, *_ in seen)


@pytest.mark.parametrize("node", [sample.FewStepSampler, sample.UniPicSigmas, sample.UniPicSamplerSelect])
def test_every_input_has_a_tooltip(node: Any) -> None:
    schema = node.define_schema()
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    assert schema.node_id == node.__name__
    assert schema.category == "UniPic"
