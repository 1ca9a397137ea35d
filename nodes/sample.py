"""FewStepSampler, and its schedule and samplers as nodes for SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..unipic_core.run.kv_cache import REUSE_WITHIN
from ..unipic_core.run.plan import Settings, resolve
from ..unipic_core.weights.recipe import LIMITS, SAMPLERS, Recipe
from . import CATEGORY
from .host.messages import tell
from .host.model.kv_cache import AUTO, KV_CACHE_MODES, with_kv_cache
from .host.recipe_attachment import facts_of
from .host.sampling.model_sampling import with_shift_of
from .host.sampling.run import prepared, sample
from .host.sampling.samplers import ksampler
from .host.sampling.schedules import sigmas_of, target_tokens

REUSE_ERROR = "48 dB PSNR on the bundled nano"
"""Of condition_cache approximate at 8 steps (tests/benchmarks/approximate.py)."""


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=LIMITS["steps"][1],
        tooltip="Number of steps. 0 = from the recipe of the weights or the LoRA; 50 without a recipe.",
    )


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 = start from noise. Less = keep more of the incoming latent: only the last steps of a longer "
        "schedule run, as in KSampler. 0 = no change.",
    )


def cache_input() -> io.Combo.Input:
    return io.Combo.Input(
        "condition_cache",
        options=list(KV_CACHE_MODES),
        default=AUTO,
        optional=True,
        tooltip="For causal weights: auto = compute the references (and the text) once and cache them for the run; off "
        "= compute them in every step, slower, with less memory. The picture is the same. For other weights: "
        f"approximate = reuse the references while t changes by at most {REUSE_WITHIN:g}: faster, with a slightly "
        f"different picture ({REUSE_ERROR}).",
    )


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepSampler",
            display_name="Few-Step Sampler (UniPic)",
            category=CATEGORY,
            description="Samples with the steps, the guidance and the sampler of the model's recipe, or of a LoRA's.",
            search_aliases=["unipic sampler", "consistency", "dmd", "lcm"],
            inputs=[*_sockets(), *_choices()],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For VAE Decode, with the VAE of Load UniPic.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: object,
        negative: object,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler: str,
        denoise: float,
        condition_cache: str = AUTO,
    ) -> io.NodeOutput:
        facts = facts_of(model)
        if condition_cache != AUTO:
            model = with_kv_cache(model, condition_cache)
        settings = resolve(facts.recipe, steps or None, cfg or None, None if sampler == "auto" else sampler)
        settings, shift, note = with_shift_of(model, settings, facts.shift)
        said = ("no recipe: " if facts.recipe == Recipe() else "") + described(settings)
        tell(cls, f"{said}; {note}" if note else said)
        tokens = target_tokens(prepared(model, latent))
        times = sigmas_of(settings, shift, tokens, denoise)
        return io.NodeOutput(sample(model, positive, negative, latent, seed, settings, times))


def _sockets() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="From Load UniPic or Distill LoRA. Other Qwen-Image-Edit models work too."),
        io.Conditioning.Input("positive", tooltip="Prompt and pictures, from Multi-Image Compose."),
        io.Conditioning.Input("negative", tooltip="Negative prompt and pictures. Not used at guidance 1."),
        io.Latent.Input("latent", tooltip="Sets the picture's size. With a noise mask only the masked part changes."),
    ]


def _choices() -> list[Any]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The same seed gives the same picture. It also sets the noise that is added between the steps.",
        ),
        steps_input(),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance, per token as in the release. 0 = from the recipe of the weights or the LoRA; 1 = no "
            "guidance, half the time.",
        ),
        io.Combo.Input(
            "sampler",
            options=["auto", *SAMPLERS],
            default="auto",
            tooltip="auto = from the recipe of the weights or the LoRA. consistency = predict the picture and add new "
            "noise in every step, for few-step weights. euler = follow the flow, for base weights.",
        ),
        denoise_input(),
        cache_input(),
    ]


def described(settings: Settings) -> str:
    """What a run does, in one line."""
    guidance = "no guidance" if settings.guidance == 1 else f"guidance {settings.guidance:g}"
    return f"{settings.steps} steps, {settings.sampler}, {guidance}"


class UniPicSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicSigmas",
            display_name="UniPic Sigmas",
            category=CATEGORY,
            description="The schedule of the model's recipe at the latent's size, for SamplerCustomAdvanced. At "
            "guidance 1 the stock sampler lcm with these sigmas gives the picture of the consistency sampler.",
            inputs=[
                io.Model.Input("model", tooltip="From Load UniPic or Distill LoRA. Its recipe sets the schedule."),
                io.Latent.Input("latent", tooltip="The latent to sample. The schedule depends on its size."),
                steps_input(),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 values, from 1 to 0.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict[str, Any], steps: int, denoise: float) -> io.NodeOutput:
        facts, tokens = facts_of(model), target_tokens(prepared(model, latent))
        settings, shift, note = with_shift_of(model, resolve(facts.recipe, steps or None), facts.shift)
        if note:
            tell(cls, note)
        return io.NodeOutput(sigmas_of(settings, shift, tokens, denoise))


class UniPicSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniPicSamplerSelect",
            display_name="UniPic Sampler Select",
            category=CATEGORY,
            description="The pack's samplers for SamplerCustomAdvanced. The seed of the noise node also sets the noise "
            "between the steps.",
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="consistency = predict the picture and add new noise in every step, for few-step weights. "
                    "euler = follow the flow, for base weights.",
                )
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler: str) -> io.NodeOutput:
        return io.NodeOutput(ksampler(sampler))
