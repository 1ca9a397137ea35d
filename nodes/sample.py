"""FewStepSampler, and its schedule and samplers as nodes for SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..unipic_core.run.kv_cache import REUSE_WITHIN
from ..unipic_core.run.kv_storage import CACHE_DTYPES, INT8_ERROR
from ..unipic_core.weights.recipe import LIMITS, MAX_SHIFT, SAMPLERS, SCHEDULES
from . import CATEGORY
from .host.messages import tell
from .host.model.kv_cache import KV_CACHE_MODES, with_kv_cache
from .host.sampling.choices import AUTO, Widgets, choices
from .host.sampling.run import prepared, sample
from .host.sampling.samplers import ksampler
from .host.sampling.schedules import sigmas_of, target_tokens

REUSE_ERROR = "42 dB PSNR on the bundled nano"
"""Error of condition_cache approximate at 8 steps (tests/benchmarks/approximate.py)."""


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
        tooltip="For causal weights: the references (and the text) are computed once and cached for the run. gpu = in "
        "the memory of the device that samples; cpu = in main memory; auto = the first of these that has room; off = "
        "compute them in every step, slower, with less memory. The picture is the same. For other weights: approximate "
        f"= reuse the references while t changes by at most {REUSE_WITHIN:g}: faster, with a slightly different "
        f"picture ({REUSE_ERROR}).",
    )


def cache_dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "cache_dtype",
        options=list(CACHE_DTYPES),
        default=AUTO,
        optional=True,
        tooltip="Numbers of the condition cache. auto = as computed. int8 = half the memory of bf16, with a slightly "
        f"different picture ({INT8_ERROR}).",
    )


def schedule_inputs() -> list[Any]:
    """New inputs, which come last: saved workflows hold widgets by position."""
    return [
        io.Combo.Input(
            "schedule",
            options=[AUTO, *SCHEDULES],
            default=AUTO,
            optional=True,
            tooltip="The times of the steps. auto = from the recipe; base = the release's for base weights, which its "
            "demo of few-step weights with euler uses too; few_step = the release's for few-step weights; "
            "fixed_shift = linear times with the same shift at every size, for step LoRAs.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=0.0,
            max=MAX_SHIFT,
            step=0.01,
            optional=True,
            tooltip="For fixed_shift. Above 1 = more steps at high noise, 1 = linear, 0 = from the recipe; 3 without "
            "one.",
        ),
    ]


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FewStepSampler",
            display_name="Few-Step Sampler (UniPic)",
            category=CATEGORY,
            description="Samples with the steps, the guidance and the sampler of the model's recipe, or of a LoRA's.",
            search_aliases=["unipic sampler", "sampler", "few step", "consistency", "dmd", "lcm", "采样"],
            inputs=[*_sockets(), *sampling_inputs(), cache_input(), *schedule_inputs(), cache_dtype_input()],
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
        schedule: str = AUTO,
        shift: float = 0.0,
        cache_dtype: str = AUTO,
    ) -> io.NodeOutput:
        x = prepared(model, latent)
        chosen = choices(model, x, Widgets(steps, cfg, sampler, schedule, shift))
        model = with_kv_cache(model, condition_cache, cache_dtype)
        tell(cls, chosen.line, chosen.level)
        times = sigmas_of(chosen.settings, chosen.shift, target_tokens(x), denoise)
        return io.NodeOutput(sample(model, positive, negative, latent, seed, chosen.settings, times))


def _sockets() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="From Load UniPic or Distill LoRA. Other Qwen-Image-Edit models work too."),
        io.Conditioning.Input("positive", tooltip="Prompt and pictures, from Multi-Image Compose."),
        io.Conditioning.Input("negative", tooltip="Negative prompt and pictures. Not used at guidance 1."),
        io.Latent.Input("latent", tooltip="Sets the picture's size. With a noise mask only the masked part changes."),
    ]


def sampling_inputs() -> list[Any]:
    """Settings of a run."""
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
    ]


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
                *schedule_inputs(),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 values, from 1 (lower with denoise) to 0.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        latent: dict[str, Any],
        steps: int,
        denoise: float,
        schedule: str = AUTO,
        shift: float = 0.0,
    ) -> io.NodeOutput:
        x = prepared(model, latent)
        chosen = choices(model, x, Widgets(steps=steps, schedule=schedule, shift=shift))
        tell(cls, chosen.times_line, chosen.level)
        return io.NodeOutput(sigmas_of(chosen.settings, chosen.shift, target_tokens(x), denoise))


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
