"""FewStepSampler, and its schedule and samplers for people who wire SamplerCustomAdvanced."""

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
        tooltip="Number of steps. 0 = as the weights or the LoRA were made for, 50 where they say nothing.",
    )


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1 = from noise. Less keeps something of the latent that comes in: only the last steps of a longer "
        "schedule are run, as KSampler does it. 0 = the latent as it is.",
    )


def cache_input() -> io.Combo.Input:
    return io.Combo.Input(
        "condition_cache",
        options=list(KV_CACHE_MODES),
        default=AUTO,
        optional=True,
        tooltip="For weights of a causal attention form: auto = the pictures (and the text) are read once and kept for "
        "the run; off = again in every step, slower and with less memory. The picture is the same. Other weights have "
        "nothing to keep exactly; for them approximate = what was read of the pictures serves further steps while t "
        f"moves by at most {REUSE_WITHIN:g}: faster, and slightly another picture ({REUSE_ERROR}).",
    )


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepSampler",
            display_name="Few-Step Sampler (UniPic)",
            category=CATEGORY,
            description="Samples as the weights want it: steps, guidance and method come with them, or with a LoRA.",
            search_aliases=["unipic sampler", "consistency", "dmd", "lcm"],
            inputs=[*_sockets(), *_choices()],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Decode it with the VAE of Load UniPic.")],
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
        io.Model.Input("model", tooltip="From Load UniPic or Distill LoRA; any Qwen-Image-Edit model works."),
        io.Conditioning.Input("positive", tooltip="Prompt and pictures, from Multi-Image Compose."),
        io.Conditioning.Input("negative", tooltip="What to move away from. Not computed at guidance 1."),
        io.Latent.Input("latent", tooltip="Its size is the size of the picture; a mask on it is respected."),
    ]


def _choices() -> list[Any]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="One seed gives one picture: it also decides the noise that is added between the steps.",
        ),
        steps_input(),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance as in the release, per token. 0 = what the weights or the LoRA were made for; 1 = none, "
            "which halves the time.",
        ),
        io.Combo.Input(
            "sampler",
            options=["auto", *SAMPLERS],
            default="auto",
            tooltip="auto = what the weights or the LoRA were made for. consistency predicts the picture and adds "
            "fresh noise; euler follows the flow.",
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
            description="The time schedule that the weights want at this size, for SamplerCustomAdvanced. With it, the "
            "stock lcm sampler at guidance 1 gives the picture of the consistency sampler.",
            inputs=[
                io.Model.Input("model", tooltip="Its recipe names the schedule; from Load UniPic or Distill LoRA."),
                io.Latent.Input("latent", tooltip="The latent to be sampled: the schedule depends on its size."),
                steps_input(),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="From 1 to 0, steps + 1 values.")],
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
            description="The pack's samplers for SamplerCustomAdvanced. The seed of the noise node decides the noise "
            "between the steps too.",
            inputs=[
                io.Combo.Input(
                    "sampler",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="consistency predicts the picture and adds fresh noise (few-step weights); euler follows "
                    "the flow (base weights).",
                )
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler: str) -> io.NodeOutput:
        return io.NodeOutput(ksampler(sampler))
