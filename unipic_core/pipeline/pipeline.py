"""UniPicPipeline: compose one to six reference images and a prompt into a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..caching import LRU, PictureCache, WeightsKey, image_key
from ..conditioning.images import resize_references, to_images, to_tensor
from ..conditioning.influence import Influence
from ..conditioning.reference_sizes import RELEASE
from ..conditioning.sequence import LatentShape, PackedLatents, TextCond, pack_with_references, unpack_latents
from ..errors import UniPicError
from ..model.attention import attention_named
from ..model.compile import compile_blocks
from ..model.mmdit import MMDiT
from ..model.reference_bias import reference_bias
from ..run.kv_cache import KVCache
from ..run.kv_storage import CacheStorage
from ..run.plan import Plan, Request, Settings, plan, resolve
from ..sampling.guidance import guided_velocity
from ..sampling.samplers import Callback, NoiseSource, Velocity, sample_consistency, sample_euler
from ..sampling.schedules import Shift, rounded_time
from ..weights.files import Weights
from ..weights.lora import LoRA, MergeReport, merge_lora, read_lora
from ..weights.recipe import Recipe
from ..weights.stored import holds_matrices_in_fp8, merge_into_stored
from .inputs import checked_images, memory_advice, noise_for
from .loading import OpenedPipeline, load_parts, open_pipeline
from .loras import AddedLoRAs
from .offload import Placement, check_machine, readable_out_of_memory
from .text_encoder import TextEncoder
from .vae import VAE

OUTPUT_TYPES = ("pil", "pt", "latent")

CACHED_REFERENCES = 32
CACHED_VISION = 4
CACHED_TEXTS = 16


@dataclass
class UniPicOutput:
    """Result of a run. images: a list of pictures; for "pt" a tensor [B, 3, H, W] in [-1, 1]; for "latent" packed
    latents [B, N_O, 4C].

    seeds: seeds[i] alone reproduces image i, up to rounding, unless latents or step_noise were given. settings: the
    resolved settings of the run.
    """

    images: Any
    seeds: list[int]
    settings: Settings


class UniPicPipeline:
    """Condition encoder, VAE and network, with the recipe of their weights."""

    def __init__(
        self,
        transformer: MMDiT,
        text_encoder: TextEncoder,
        vae: VAE,
        recipe: Recipe = Recipe(),
        shift: Shift = Shift(),
        device: torch.device | str = "cpu",
        offload: bool = False,
        cache: CacheStorage = CacheStorage(),
    ) -> None:
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.vae = vae
        self.base_recipe = recipe
        self._loras = AddedLoRAs()
        self._stored: Weights | None = None
        """Weights of a network in fp8, from which its matrices are computed again when a LoRA is added."""
        self._added: list[tuple[LoRA, float]] = []
        self.shift = shift
        self.placement = Placement(torch.device(device), offload)
        self._reference_cache: PictureCache[Tensor] = PictureCache(CACHED_REFERENCES)
        self._vision_cache: LRU[Tensor] = LRU(CACHED_VISION)
        self._text_cache: LRU[TextCond] = LRU(CACHED_TEXTS)
        self._kv_cache = KVCache(cache)
        self._base_attention_form = transformer.config.attention_form

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        transformer: str | Path | None = None,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        attention: str = "sdpa",
        compile: bool = False,
        storage: str = "auto",
        condition_cache: str = "auto",
        cache_dtype: str = "auto",
    ) -> UniPicPipeline:
        """Load a pipeline folder; `transformer` replaces the network by that of another folder or file.

        attention: a name in attention.ATTENTIONS. compile: torch.compile for the network's blocks, minutes before the
        first step and faster steps after it. storage: of the network's matrices, one of STORAGES; "fp8" halves their
        memory. If a GPU cannot hold all parts, they take turns on it, and some of the network's blocks are copied from
        main memory in every step. condition_cache, cache_dtype: place and numbers of the cached keys and values of a
        causal network, names in CACHE_PLACES and CACHE_DTYPES (run/kv_storage.py). Raises UniPicError with the parts to
        download if some are missing; without a GPU pass device="cpu".
        """
        check_machine(device, attention, compile)
        cache = CacheStorage(condition_cache, cache_dtype)
        opened = open_pipeline(folder, transformer)
        return cls.from_opened(opened, torch_dtype, device, attention, compile, storage, cache)

    @classmethod
    def from_opened(
        cls,
        opened: OpenedPipeline,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        attention: str = "sdpa",
        compile: bool = False,
        storage: str = "auto",
        cache: CacheStorage = CacheStorage(),
    ) -> UniPicPipeline:
        """Load like `from_pretrained` from an OpenedPipeline."""
        check_machine(device, attention, compile)
        pipe = cls(**vars(load_parts(opened, torch_dtype, device, storage, cache)), cache=cache)
        pipe._stored = opened.model.weights if holds_matrices_in_fp8(pipe.transformer) else None
        pipe.transformer.attention = attention_named(attention)
        if compile:
            compile_blocks(pipe.transformer)
        return pipe

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def cache_storage(self) -> CacheStorage:
        """Place and dtype of cached keys and values of a causal network; may be set between runs."""
        return self._kv_cache.storage

    @cache_storage.setter
    def cache_storage(self, storage: CacheStorage) -> None:
        self._kv_cache.storage = storage

    @property
    def recipe(self) -> Recipe:
        """Recipe of the checkpoint, overridden by those of its LoRAs in order."""
        return self._loras.over(self.base_recipe)

    def load_lora(self, lora: str | Path | LoRA, strength: float = 1.0) -> MergeReport:
        """Add a LoRA to the network's weights; its recipe, if any, overrides the checkpoint's.

        Loading it again with -strength undoes it, recipe included; strength 0 changes nothing. Raises LoRAError if no
        layer matches, and UniPicError for a strength that is not a finite number.
        """
        lora = lora if isinstance(lora, LoRA) else read_lora(lora)
        loras = self._loras.add(lora.path, lora.recipe, strength)
        recipe = loras.over(self.base_recipe)
        resolve(recipe)  # refuses what this version does not have before the weights change
        self._kv_cache.clear()  # of the old weights: WeightsKey does not see writes to inference tensors
        with torch.inference_mode():  # weights loaded in inference mode can be written only in it
            if self._stored is None:
                report = merge_lora(self.transformer, lora, float(strength))
            else:
                report = merge_into_stored(self.transformer, self._stored, self._added, lora, float(strength))
                self._added.append((lora, float(strength)))
        self._loras = loras
        attention_form = recipe.causal_attention_form or self._base_attention_form
        self.transformer.config = self.transformer.config.with_attention_form(attention_form)
        if report.unmatched:
            unmatched = f"{len(report.unmatched)} match no layer of the network ({', '.join(report.unmatched[:3])})"
            warnings.warn(f"{lora.name}: {report.matched} layers added, {unmatched}", stacklevel=2)
        return report

    def clear_cache(self) -> None:
        """Empty the caches of encoded references, prompts, and keys and values, for example to free their memory.

        Changed weights and parts are detected (`WeightsKey`), except a few values that are written through `.data` or
        to weights that were loaded in torch.inference_mode.
        """
        self._reference_cache.clear()
        self._vision_cache.clear()
        self._text_cache.clear()
        self._kv_cache.clear()

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Image.Image] | Image.Image = (),
        prompt: str = "",
        negative_prompt: str = " ",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        true_cfg_scale: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        num_images: int = 1,
        reference_budget: int | None = None,
        latents: Tensor | None = None,
        step_noise: Sequence[Tensor] | None = None,
        callback: Callback | None = None,
        output_type: str = "pil",
        schedule: str | None = None,
        shift: float | None = None,
        share: str = RELEASE,
        reference_weights: Sequence[float] | None = None,
        aspect: str | None = None,
        influences: Sequence[Influence] | None = None,
    ) -> UniPicOutput:
        """Compose a picture. None = from the recipe, else the default of the released weights (docs/recipes.md).

        images: 0 to 6 references in the order of their numbers in the prompt. height, width: in pixels, multiples of 16
        within the output budget; default the first reference's aspect. true_cfg_scale: guidance; 1 = no unconditional
        pass. sampler: "consistency" or "euler". seed: image i of num_images uses seed + i. latents: packed start noise
        [B, N_O, 4C]. step_noise: noises added by the consistency sampler, [B, N_O, 4C] for each step but the last.
        callback: called as callback(step, t, x_t, x0) after each step, counted from 0; t is the time reached, 0 after
        the last step, x_t the latent at t, x0 the prediction. output_type: "pil", "pt" or "latent". schedule: "base",
        "few_step", or "fixed_shift" with `shift`. share: division of the reference budget, "release" (one scale for
        all) or "equal" (equal areas). reference_weights: one factor on the share of each reference. aspect: of the
        output, such as "16:9", with at most one of height and width. influences: strength, region and time range of
        each reference. Raises UniPicError.
        """
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=num_inference_steps,
            guidance=true_cfg_scale,
            sampler=sampler,
            seed=seed,
            num_images=num_images,
            reference_budget=reference_budget,
            schedule=schedule,
            shift=shift,
            share=share,
            reference_weights=reference_weights,
            aspect=aspect,
            influences=influences,
        )
        return self.run(images, request, latents, step_noise, callback, output_type)

    @torch.no_grad()
    def run(
        self,
        images: Sequence[Image.Image] | Image.Image,
        request: Request,
        latents: Tensor | None = None,
        step_noise: Sequence[Tensor] | None = None,
        callback: Callback | None = None,
        output_type: str = "pil",
    ) -> UniPicOutput:
        """Compose like `__call__`, from a Request."""
        if output_type not in OUTPUT_TYPES:
            raise UniPicError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        originals = checked_images(images)
        planned = plan(self.recipe, [image.size for image in originals], request)
        settings, shape = planned.settings, LatentShape.of_pixels(*planned.size)
        token = shape.num_tokens, self.transformer.config.in_channels
        start, noise = noise_for(planned, token, self.device, latents, step_noise)
        with readable_out_of_memory(memory_advice(planned, len(originals), len(start))):
            references, cond, uncond = self._encode(originals, planned)
            packed = pack_with_references(start, shape, [references] * len(start))
            x0 = self._sample(packed, cond, uncond, noise, planned, callback)
            output = x0 if output_type == "latent" else self._decode(x0, shape)
        seeds = [planned.seed + i for i in range(len(start))]
        return UniPicOutput(to_images(output) if output_type == "pil" else output, seeds, settings)

    def _encode(self, originals: list[Image.Image], planned: Plan) -> tuple[list[Tensor], TextCond, TextCond | None]:
        """Encode the references to latents [1, C, 1, h, w], the prompt, and with guidance the negative prompt."""
        request, settings = planned.request, planned.settings
        references = resize_references(originals, settings.reference_budget, request.share, request.reference_weights)
        cond = self._encode_text(references, request.prompt)
        uncond = self._encode_text(references, request.negative_prompt) if settings.guidance != 1 else None
        return self._encode_references(references), cond, uncond

    def _sample(
        self,
        packed: PackedLatents,
        cond: TextCond,
        uncond: TextCond | None,
        noise: NoiseSource,
        planned: Plan,
        callback: Callback | None,
    ) -> Tensor:
        """Sample x0 [B, N_O, 4C]. packed: the start noise with the references."""
        settings = planned.settings
        times = settings.times(packed.num_target_tokens, self.shift).tolist()
        try:
            velocity = self._velocity(packed, cond, uncond, planned)  # inside, since it holds the kv_cache
            if settings.sampler == "euler":
                return sample_euler(velocity, packed.target, times, callback)
            return sample_consistency(velocity, packed.target, times, noise, callback)
        finally:
            if self.placement.offload:  # free the memory for the next part, or for another attempt
                self._kv_cache.clear()

    def _use(self, name: str) -> Any:
        """Move a part to the device and return it."""
        parts = {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.vae}
        return self.placement.place(parts, name)

    def _encode_text(self, references: list[Image.Image], prompt: str) -> TextCond:
        """Encode a prompt; the vision tower runs once for all prompts with the same references."""
        encoder, weights = self.text_encoder, WeightsKey(self.text_encoder.network, sampled=True)
        pictures = tuple(image_key(r) for r in references)

        def encode() -> TextCond:
            self._use("text_encoder")
            vision = self._vision_cache.get((weights, pictures), lambda: encoder.vision([references]))
            return encoder.encode([references], [prompt], vision)

        return self._text_cache.get((weights, encoder.positions, pictures, prompt), encode)

    def _encode_references(self, references: list[Image.Image]) -> list[Tensor]:
        """Encode the resized references to latents [1, C, 1, h, w]."""

        def encode(pictures: list[Image.Image]) -> Sequence[Tensor]:
            pixels = torch.stack([to_tensor(picture) for picture in pictures]).to(self.device)
            latents: Tensor = self._use("vae").encode(pixels)
            return latents.split(1)

        return self._reference_cache.encode(references, WeightsKey(self.vae.model, sampled=True), encode)

    def _velocity(self, packed: PackedLatents, cond: TextCond, uncond: TextCond | None, planned: Plan) -> Velocity:
        """Velocity function (x_t, t) -> v in float32, guided if there is an unconditional text."""
        batch, settings, influences = packed.tokens.shape[0], planned.settings, planned.influences
        intervals = settings.intervals(influences, packed.num_target_tokens, self.shift)
        transformer = self._use("transformer")
        texts = [cond] if uncond is None else [cond, uncond]
        key_values = {id(text): self._kv_cache.get(transformer, packed.row(0), text) for text in texts}

        def conditional_velocity(latents: PackedLatents, t: float, text: TextCond) -> Tensor:
            time = rounded_time(t, settings.time_rounding, transformer.dtype)
            bias = reference_bias(influences, intervals, packed.shapes[0][0], t)
            return transformer(latents, time, text.expand(batch), cache=key_values[id(text)], reference_bias=bias)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            return guided_velocity(conditional_velocity, packed.with_target(x_t), t, cond, uncond, settings.guidance)

        return velocity

    def _decode(self, x0: Tensor, shape: LatentShape) -> Tensor:
        return self._use("vae").decode(unpack_latents(x0, shape)).cpu()
