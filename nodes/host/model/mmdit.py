"""UniPic's MMDiT as ComfyUI's `diffusion_model`: the core's network with ComfyUI's layers, attention and hooks.

Parameters have their diffusers names at the top level, where LoRA loaders look for them. All hooks of ComfyUI's own
Qwen-Image network work: patches "post_input", "attn1_patch" and "double_block", replacement of ("double_block", i),
ControlNet residuals, attention override and diffusion model wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....unipic_core.conditioning.sequence import PATCH, PackedLatents, unpack_latents
from ....unipic_core.model.attention_forms import Segment, Step, advance, through_blocks
from ....unipic_core.model.blocks import KeyValue, KeyValues, KeyValueStore
from ....unipic_core.model.config import REFERENCE_CAUSAL, REFERENCES, SEGMENTS, TEXT, MMDiTConfig
from ....unipic_core.model.layers import Operations
from ....unipic_core.model.mmdit import MMDiTLayers
from ....unipic_core.sampling.schedules import rounded_time
from .attention import HookedState, Options, attention_on, check_patches, rotation_matrices, text_bias
from .influences import TimedInfluences, bias_at
from .inputs import NetworkInputs, checked_method, checked_text, packed, positions
from .kv_cache import ATTENTION_FORM, OPTION_KEYS, TIME_ROUNDING, ApproximateReferences, KVCache, new_store


def network_options(config: MMDiTConfig) -> Options:
    """Arguments of `ComfyMMDiT` for these sizes, in the form of ComfyUI's unet_config."""
    return {"image_model": "qwen_image", **asdict(config)}


class ComfyMMDiT(MMDiTLayers):
    """Velocity network that ComfyUI calls. sizes: fields of `MMDiTConfig`.

    dtype: the weights' storage type; activations have the type of the latent x.
    """

    def __init__(
        self,
        *,
        operations: Operations,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        image_model: str = "qwen_image",
        **sizes: Any,
    ) -> None:
        config = MMDiTConfig(**sizes)
        super().__init__(config, operations=operations, dtype=dtype, device=device)
        self.storage_dtype = dtype
        self.kv_cache = KVCache()
        self.patch_size = PATCH
        self.default_ref_method = "index_timestep_zero" if config.zero_cond_t else "index"

    @property
    def dtype(self) -> torch.dtype | None:  # by it ComfyUI decides whether layers must cast
        return self.storage_dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        transformer_options: Options | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Velocity of x [B, C, 1, H, W] (or without the frame) at times `timestep` [B] in [0, 1]; the same shape.

        context: [B, L, D]; attention_mask: [B, L], whole numbers (0 = padding) or a float bias; ref_latents: each
        [1 or B, C, 1, h, w]; control (in kwargs): residuals by block under "input". Raises UniPicError.
        """
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        if wrappers:  # EasyCache adds to x in place, and in float32 x is the sampler's latent itself
            x = x.clone()
        return WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute(
            x, timestep, context, attention_mask, ref_latents, additional_t_cond, options, **kwargs
        )

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latents: Sequence[Tensor] | None = None,
        additional_t_cond: Tensor | None = None,
        transformer_options: Options | None = None,
        control: dict[str, object] | None = None,
        ref_latents_method: str | None = None,
        unipic_influences: TimedInfluences = (),
        **unipic_options: object,
    ) -> Tensor:
        method = checked_method(ref_latents_method or self.default_ref_method)
        sigma = timestep
        options = {**(transformer_options or {}), **{k: v for k, v in unipic_options.items() if k in OPTION_KEYS}}
        timestep = rounded_time(timestep, options.get(TIME_ROUNDING, "none"), x.dtype)
        form = options.get(ATTENTION_FORM) or self.config.attention_form
        latents = packed(x, ref_latents or (), self.config.in_channels)
        inputs = NetworkInputs(
            attention_form=form,
            key=(form, method, x.dtype),
            latents=latents,
            context=checked_text(context, self.config.joint_attention_dim),
            ids=self._positions(latents, context.shape[1], x.device, method),
            bias=text_bias(attention_mask, x.dtype),
            additional_t_cond=additional_t_cond,
            options={key: value for key, value in options.items() if not key.startswith("patches")},
            reference_bias=bias_at(unipic_influences, latents.shapes[0], sigma),
        )
        approximate = self.kv_cache.approximate_references(inputs)
        if approximate is not None and approximate.valid_at(float(timestep[0])):
            segments: list[Segment] = []
            past = [approximate.key_values]
            inputs, approximate = replace(inputs, attention_form=REFERENCE_CAUSAL), None
        else:
            segments, past = self._earlier_segments(inputs)
        options = self._options(latents, options)
        return self._velocity(x, timestep, inputs, segments, past, options, control, method, approximate)

    def _velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        inputs: NetworkInputs,
        earlier: Sequence[Segment],
        past: Sequence[KeyValues],
        options: Options,
        control: dict[str, object] | None,
        method: str,
        approximate: ApproximateReferences | None,
    ) -> Tensor:
        """Velocity from the target's segment, which attends to `earlier` segments and to `past`.

        Hooks see that segment alone: in a causal form it has no references, and perhaps no text (None).
        approximate: stores the references' keys and values of this step; None = they are not needed later.
        """
        latents, pieces = inputs.latents, SEGMENTS[inputs.attention_form][-1]
        words = inputs.context.shape[1] if TEXT in pieces else 0
        images = latents.tokens.shape[1] if REFERENCES in pieces else latents.num_target_tokens
        at_zero = method == "index_timestep_zero" and images > latents.num_target_tokens
        img, txt, picture_ids, text_ids = self._embed(inputs, words, images, options)
        temb = self._time(timestep, img, at_zero, inputs.additional_t_cond)
        is_target = torch.arange(img.shape[1], device=img.device) < latents.num_target_tokens
        state = HookedState(
            rope=self.pe_embedder(torch.cat([text_ids, picture_ids], dim=1)),
            mask=inputs.mask((*SEGMENTS[inputs.attention_form][:-1], pieces), picture_ids.shape[1]),
            reference=~is_target[None, :, None] if at_zero else None,
            attention=attention_on(x.device),
            options=options,
            words=words,
            return_kv=approximate is not None,
        )
        target = Segment(pieces, img, txt, temb, state, latents.num_target_tokens)
        stored = None if approximate is None else new_store(inputs)
        collect = None if stored is None else partial(_append_references, stored)
        step = self._step_with_hooks(x, options, control)
        target = through_blocks(self.transformer_blocks, [*earlier, target], past, step, collect)[-1]
        assert target.img is not None  # the target's segment has image tokens
        if approximate is not None and stored is not None and len(stored) == len(self.transformer_blocks):
            approximate.t, approximate.key_values = float(timestep[0]), stored
        velocity = self.proj_out(self.norm_out(target.img[:, : latents.num_target_tokens], temb[: x.shape[0]]))
        velocity = unpack_latents(velocity, latents.shapes[0][0])[..., : x.shape[-2], : x.shape[-1]]
        return velocity if x.ndim == 5 else velocity[:, :, 0]

    def _embed(
        self, inputs: NetworkInputs, words: int, images: int, options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The first `images` image tokens and the text (None where words is 0) before the first block, and the
        positions of both. Patches "post_input" may change all four."""
        start, tokens = inputs.context.shape[1], inputs.latents.tokens
        img = self.img_in(tokens[:, :images])
        txt = self.embed_text(inputs.context.to(tokens.dtype)) if words else None
        text_ids, picture_ids = inputs.ids[:, :words], inputs.ids[:, start : start + images]
        for patch in options.get("patches", {}).get("post_input", ()):
            args = {"img": img, "txt": txt, "img_ids": picture_ids, "txt_ids": text_ids, "transformer_options": options}
            out = patch(args)
            img, txt, picture_ids, text_ids = out["img"], out["txt"], out["img_ids"], out["txt_ids"]
        return img, txt, picture_ids, text_ids

    def _step_with_hooks(self, x: Tensor, options: Options, control: dict[str, Any] | None) -> Step:
        """`advance` with ComfyUI's hooks around the last segment; the last block is pruned where no hook sees it."""
        check_patches(options)
        replacements = options.get("patches_replace", {}).get("dit", {})
        after = options.get("patches", {}).get("double_block", ())
        residuals = (control or {}).get("input") or ()
        hooked = bool(options.get("patches") or replacements or residuals or "optimized_attention_override" in options)
        index = {id(block): i for i, block in enumerate(self.transformer_blocks)}

        def step(
            block: object, segments: Sequence[Segment], past: tuple[KeyValue, ...], last: bool
        ) -> tuple[list[Segment], list[KeyValue]]:
            i = options["block_index"] = index[id(block)]
            *before, target = segments
            before, computed = advance(block, before, past, last)
            past = (*past, *computed)
            if ("double_block", i) in replacements:
                target = _replaced(replacements[("double_block", i)], block, target, past, options)
                key_values: list[KeyValue] = []
            else:
                [target], key_values = advance(block, [target], past, last and not hooked)
                key_values = [_references_of(kv, target) for kv in key_values]
            for patch in after:
                args = {"img": target.img, "txt": target.txt, "x": x, "block_index": i, "transformer_options": options}
                out = patch(args)
                target = replace(target, img=out["img"], txt=out["txt"])
            if i < len(residuals) and residuals[i] is not None:
                assert target.img is not None  # the target's segment has image tokens
                target.img[:, : residuals[i].shape[1]] += residuals[i]
            return [*before, target], key_values

        return step

    # --- references and text that no step changes ---

    def _earlier_segments(self, inputs: NetworkInputs) -> tuple[list[Segment], list[KeyValues]]:
        """The segments before the target's: to be computed in this step, or their cached keys and values.

        Computed ones go through each block just before the target, so each block's keys and values are freed after it.
        """
        segments = [piece for (piece,) in SEGMENTS[inputs.attention_form][:-1]]
        pieces = [piece for piece in segments if piece != REFERENCES or inputs.has_references]
        past: list[KeyValues] = []
        for piece in pieces if self.kv_cache.may_cache(inputs) else ():
            cached = self.kv_cache.get(piece, inputs, partial(self._prefill, piece, inputs, tuple(past)))
            if cached is None:
                break
            past.append(cached)
        return [self._segment(piece, inputs) for piece in pieces[len(past) :]], past

    def _prefill(self, piece: str, inputs: NetworkInputs, past: Sequence[KeyValues], store: KeyValueStore) -> None:
        """Compute the keys and values of references or text in every block into the store."""

        def collect(of_block: list[KeyValue]) -> None:
            [kv] = of_block
            store.append(kv)

        through_blocks(self.transformer_blocks, [self._segment(piece, inputs)], past, collect=collect)

    def _segment(self, piece: str, inputs: NetworkInputs) -> Segment:
        """References or text before the first block; of one sample where the whole batch shares them."""
        rows, words, n = inputs.rows[piece], inputs.context.shape[1], inputs.latents.num_target_tokens
        is_text = piece == TEXT
        img = None if is_text else self.img_in(inputs.references[:rows])
        txt = self.embed_text(inputs.context[:rows].to(inputs.latents.tokens.dtype)) if is_text else None
        tokens = img if txt is None else txt
        assert tokens is not None  # a segment that never changes is one of the two
        mask = inputs.mask(((REFERENCES,), (TEXT,)), 0) if is_text else None
        state = HookedState(
            rope=self.pe_embedder(inputs.ids[:rows, :words] if is_text else inputs.ids[:rows, words + n :]),
            mask=None if mask is None else mask[:rows],
            reference=None,
            attention=attention_on(tokens.device),
            options=inputs.options,
            words=words if is_text else 0,
            return_kv=True,
        )
        additional = None if inputs.additional_t_cond is None else inputs.additional_t_cond[:rows]
        temb = self._time(torch.zeros(1, device=tokens.device), tokens, False, additional)
        return Segment((piece,), img, txt, temb, state, 0)

    def pe_embedder(self, ids: Tensor) -> Tensor:
        """Rotation matrices of positions [B, N, 3]; ControlNets that share layers with the network call it too."""
        return rotation_matrices(ids, self.config.axes_dims_rope)

    def process_img(self, x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Tokens [B, S, 4C] and positions [B, S, 3] of a picture, and its padded shape; ControlNets call it too."""
        latents = packed(x, (), self.config.in_channels)
        ids = self._positions(latents, 0, x.device, "index")
        return latents.tokens, ids, pad_to_patch_size(x, (1, PATCH, PATCH)).shape

    def _options(self, latents: PackedLatents, options: Options) -> Options:
        """A copy of transformer_options with the entries that patches read; the loop over blocks adds "block_index"."""
        options = {**options, "total_blocks": len(self.transformer_blocks), "block_type": "double"}
        references = latents.shapes[0][1:]
        return options | {"reference_image_num_tokens": [s.num_tokens for s in references]} if references else options

    def _time(self, t: Tensor, like: Tensor, at_zero: bool, additional: Tensor | None) -> Tensor:
        """[B, width], or [2B, width] with the second half at t = 0, for the references."""
        if self.config.use_additional_t_cond and additional is None:
            additional = torch.zeros(1, dtype=torch.long, device=like.device)
        return self.embed_time(t, like, additional, at_zero)

    def _positions(self, latents: PackedLatents, words: int, device: torch.device, method: str) -> Tensor:
        """Positions [B, L + S, 3], text first; patches may change them."""
        return positions(latents, words, self.config.use_layer3d_rope, method).to(device)


def _append_references(store: KeyValueStore, of_block: list[KeyValue]) -> None:
    """Store one block's keys and values; a replaced block returns none."""
    for kv in of_block:
        store.append(kv)


def _references_of(kv: KeyValue, target: Segment) -> KeyValue:
    """The references' part of a full segment's keys and values; copied, since a view would hold the rest in memory."""
    assert isinstance(target.state, HookedState)  # set by `_velocity`
    start = target.state.words + target.num_outputs
    return kv[0][:, :, start:].clone(), kv[1][:, :, start:].clone()


def _replaced(
    replacement: Callable[..., Options], block: Any, target: Segment, past: tuple[KeyValue, ...], options: Options
) -> Segment:
    """The target after a patch that replaces the block; the patch may call the original block."""
    assert isinstance(target.state, HookedState)  # set by `_velocity`
    state = replace(target.state, past=past)
    args = {"img": target.img, "txt": target.txt, "vec": target.temb, "pe": state.rope, "transformer_options": options}
    out = replacement(args, {"original_block": _original(block, state)})
    return replace(target, img=out["img"], txt=out["txt"])


def _original(block: Callable[..., tuple[Tensor, Tensor, object]], state: HookedState) -> Callable[[Options], Options]:
    """The original block in the form that replacing patches call."""

    def run(args: Options) -> Options:
        changed = replace(state, rope=args["pe"], options=args["transformer_options"])
        img, txt, _ = block(args["img"], args["txt"], args["vec"], changed)
        return {"img": img, "txt": txt}

    return run
