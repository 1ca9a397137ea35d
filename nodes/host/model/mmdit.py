"""The core's network as ComfyUI holds it: made of ComfyUI's layers and attention, called as ComfyUI calls its own.

Parameters sit at the top level under their diffusers names, so LoRA loaders find them. The hooks that ComfyUI offers on
its own Qwen-Image network work here: patches "post_input", "attn1_patch" and "double_block", replacement of
("double_block", i), ControlNet residuals, attention override and diffusion model wrappers.
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
from ....unipic_core.model.blocks import KeyValue
from ....unipic_core.model.config import REFERENCE_CAUSAL, REFERENCES, SEGMENTS, TEXT, MMDiTConfig
from ....unipic_core.model.layers import Operations
from ....unipic_core.model.mmdit import MMDiTLayers
from ....unipic_core.sampling.schedules import rounded_time
from .attention import HookedState, Options, attention_on, rotation_matrices, text_bias
from .inputs import checked_method, checked_text, packed, positions
from .kv_cache import FORM, OWN_OPTIONS, ROUNDING, Conditions, Fixed, Kept, Reused


def network_options(config: MMDiTConfig) -> Options:
    """`ComfyMMDiT`'s arguments for these sizes, as ComfyUI keeps them in unet_config."""
    return {"image_model": "qwen_image", **asdict(config)}


class ComfyMMDiT(MMDiTLayers):
    """The velocity network behind ComfyUI's `diffusion_model`. sizes: fields of `MMDiTConfig`.

    dtype: what weights are stored in; activations have the type of the latent that comes in.
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
        self.compute_dtype_of = dtype
        self.conditions = Conditions()
        self.patch_size = PATCH
        self.default_ref_method = "index_timestep_zero" if config.zero_cond_t else "index"

    @property
    def dtype(self) -> torch.dtype | None:  # ComfyUI decides by this whether layers must cast
        return self.compute_dtype_of

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
        if wrappers:  # EasyCache adds to x in place, and in float32 x is the sampler's own latent
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
        control: dict[str, Any] | None = None,
        ref_latents_method: str | None = None,
        **own: object,
    ) -> Tensor:
        method = checked_method(ref_latents_method or self.default_ref_method)
        options = {**(transformer_options or {}), **{key: own[key] for key in OWN_OPTIONS if key in own}}
        timestep = rounded_time(timestep, options.get(ROUNDING, "none"), x.dtype)
        form = options.get(FORM) or self.config.attention_form
        latents = packed(x, ref_latents or (), self.config.in_channels)
        fixed = Fixed(
            form=form,
            key=(form, method, x.dtype),
            latents=latents,
            context=checked_text(context, self.config.joint_attention_dim),
            ids=self._positions(latents, context.shape[1], x.device, method),
            bias=text_bias(attention_mask, x.dtype),
            additional=additional_t_cond,
            options={key: value for key, value in options.items() if not key.startswith("patches")},
        )
        reused = self.conditions.approximate(fixed)
        if reused is not None and reused.serves(float(timestep[0])):
            computed: list[Segment] = []
            fixed, past, reused = replace(fixed, form=REFERENCE_CAUSAL), [reused.kept], None
        else:
            computed, past = self._past(fixed)
        options = self._options(latents, options)
        return self._moving(x, timestep, fixed, computed, past, options, control, method, reused)

    def _moving(
        self,
        x: Tensor,
        timestep: Tensor,
        fixed: Fixed,
        computed: Sequence[Segment],
        past: Sequence[Kept],
        options: Options,
        control: dict[str, Any] | None,
        method: str,
        reused: Reused | None,
    ) -> Tensor:
        """The velocity. Hooks see the last segment: in a causal form no references, and perhaps no text (None).

        reused: takes the references' keys and values of this step.
        """
        latents, pieces = fixed.latents, SEGMENTS[fixed.form][-1]
        words = fixed.context.shape[1] if TEXT in pieces else 0
        images = latents.tokens.shape[1] if REFERENCES in pieces else latents.num_target_tokens
        at_zero = method == "index_timestep_zero" and images > latents.num_target_tokens
        img, txt, picture_ids, text_ids = self._entering(fixed, words, images, options)
        temb = self._time(timestep, img, at_zero, fixed.additional)
        is_target = torch.arange(img.shape[1], device=img.device) < latents.num_target_tokens
        state = HookedState(
            rope=self.pe_embedder(torch.cat([text_ids, picture_ids], dim=1)),
            mask=fixed.mask((*SEGMENTS[fixed.form][:-1], pieces), picture_ids.shape[1]),
            reference=~is_target[None, :, None] if at_zero else None,
            attention=attention_on(x.device),
            options=options,
            words=words,
            keeps=reused is not None,
        )
        target = Segment(pieces, img, txt, temb, state, latents.num_target_tokens)
        kept: list[list[KeyValue]] | None = None if reused is None else []
        step = self._hooked(x, options, control)
        target = through_blocks(self.transformer_blocks, [*computed, target], past, step, kept)[-1]
        assert target.img is not None  # the target's segment has image tokens
        if reused is not None and kept and all(kept):  # a replaced block keeps nothing
            reused.t, reused.kept = float(timestep[0]), tuple(kv for (kv,) in kept)
        velocity = self.proj_out(self.norm_out(target.img[:, : latents.num_target_tokens], temb[: x.shape[0]]))
        velocity = unpack_latents(velocity, latents.shapes[0][0])[..., : x.shape[-2], : x.shape[-1]]
        return velocity if x.ndim == 5 else velocity[:, :, 0]

    def _entering(
        self, fixed: Fixed, words: int, images: int, options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The first `images` image tokens and the text, None where words is 0, as they enter the first block; and the
        positions of both. Patches "post_input" may change all four."""
        start, tokens = fixed.context.shape[1], fixed.latents.tokens
        img = self.img_in(tokens[:, :images])
        txt = self.embed_text(fixed.context.to(tokens.dtype)) if words else None
        text_ids, picture_ids = fixed.ids[:, :words], fixed.ids[:, start : start + images]
        for patch in options.get("patches", {}).get("post_input", ()):
            seen = {"img": img, "txt": txt, "img_ids": picture_ids, "txt_ids": text_ids, "transformer_options": options}
            out = patch(seen)
            img, txt, picture_ids, text_ids = out["img"], out["txt"], out["img_ids"], out["txt_ids"]
        return img, txt, picture_ids, text_ids

    def _hooked(self, x: Tensor, options: Options, control: dict[str, Any] | None) -> Step:
        """`advance` with ComfyUI's hooks around the last segment; where none can see it, the last block is pruned."""
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
            before, made = advance(block, before, past, last)
            if ("double_block", i) in replacements:
                target = _replaced(replacements[("double_block", i)], block, target, (*past, *made), options)
                kept: list[KeyValue] = []
            else:
                [target], kept = advance(block, [target], (*past, *made), last and not hooked)
                kept = [_references_of(kv, target) for kv in kept]
            for patch in after:
                seen = {"img": target.img, "txt": target.txt, "x": x, "block_index": i, "transformer_options": options}
                out = patch(seen)
                target = replace(target, img=out["img"], txt=out["txt"])
            if i < len(residuals) and residuals[i] is not None:
                assert target.img is not None  # the target's segment has image tokens
                target.img[:, : residuals[i].shape[1]] += residuals[i]
            return [*before, target], kept

        return step

    # --- what no step changes ---

    def _past(self, fixed: Fixed) -> tuple[list[Segment], list[Kept]]:
        """The segments before the target's: to be computed in this step, or their keys and values from the run's cache.

        Computed ones go through each block just before the target, so no block's keys and values stay for long.
        """
        pieces = [piece for (piece,) in SEGMENTS[fixed.form][:-1] if piece != REFERENCES or fixed.latents.shapes[0][1:]]
        if not pieces or not self.conditions.keeps(fixed):
            return [self._segment(piece, fixed) for piece in pieces], []
        made: list[Kept] = []
        for piece in pieces:
            made.append(self.conditions.get(piece, fixed, partial(self._prefill, piece, fixed, tuple(made))))
        return [], made

    def _prefill(self, piece: str, fixed: Fixed, past: Sequence[Kept]) -> Kept:
        """Keys and values of references or text in every block."""
        kept: list[list[KeyValue]] = []
        through_blocks(self.transformer_blocks, [self._segment(piece, fixed)], past, keep=kept)
        return tuple(kv for (kv,) in kept)

    def _segment(self, piece: str, fixed: Fixed) -> Segment:
        """References or text as they enter the first block; of one sample, if all of a batch are alike."""
        rows, words, n = fixed.rows[piece], fixed.context.shape[1], fixed.latents.num_target_tokens
        is_text = piece == TEXT
        img = None if is_text else self.img_in(fixed.references[:rows])
        txt = self.embed_text(fixed.context[:rows].to(fixed.latents.tokens.dtype)) if is_text else None
        tokens = img if txt is None else txt
        assert tokens is not None  # a segment that never changes is one of the two
        mask = fixed.mask(((REFERENCES,), (TEXT,)), 0) if is_text else None
        state = HookedState(
            rope=self.pe_embedder(fixed.ids[:rows, :words] if is_text else fixed.ids[:rows, words + n :]),
            mask=None if mask is None else mask[:rows],
            reference=None,
            attention=attention_on(tokens.device),
            options=fixed.options,
            words=words if is_text else 0,
            keeps=True,
        )
        additional = None if fixed.additional is None else fixed.additional[:rows]
        temb = self._time(torch.zeros(1, device=tokens.device), tokens, False, additional)
        return Segment((piece,), img, txt, temb, state, 0)

    def pe_embedder(self, ids: Tensor) -> Tensor:
        """Rotation matrices of positions [B, N, 3]; ControlNets that share layers with the network ask for it too."""
        return rotation_matrices(ids, self.config.axes_dims_rope)

    def process_img(self, x: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Tokens [B, S, 4C] and positions [B, S, 3] of a picture, and its shape padded to whole tokens; as above."""
        latents = packed(x, (), self.config.in_channels)
        ids = self._positions(latents, 0, x.device, "index")
        return latents.tokens, ids, pad_to_patch_size(x, (1, PATCH, PATCH)).shape

    def _options(self, latents: PackedLatents, given: Options) -> Options:
        """A copy of transformer_options with what patches read there; the loop over blocks adds "block_index"."""
        options = {**given, "total_blocks": len(self.transformer_blocks), "block_type": "double"}
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


def _references_of(kv: KeyValue, target: Segment) -> KeyValue:
    """The references' share of a full segment's keys and values; copied, or the others would stay in memory with it."""
    assert isinstance(target.state, HookedState)  # made by `_moving`
    start = target.state.words + target.wanted
    return kv[0][:, :, start:].clone(), kv[1][:, :, start:].clone()


def _replaced(
    replacement: Callable[..., Options], block: Any, target: Segment, past: tuple[KeyValue, ...], options: Options
) -> Segment:
    """A block that a patch replaces, with the block itself at hand."""
    assert isinstance(target.state, HookedState)  # made by `_moving`
    state = replace(target.state, past=past)
    args = {"img": target.img, "txt": target.txt, "vec": target.temb, "pe": state.rope, "transformer_options": options}
    out = replacement(args, {"original_block": _original(block, state)})
    return replace(target, img=out["img"], txt=out["txt"])


def _original(block: Callable[..., tuple[Tensor, Tensor, object]], state: HookedState) -> Callable[[Options], Options]:
    """The block itself, as replacements call it."""

    def run(args: Options) -> Options:
        seen = replace(state, rope=args["pe"], options=args["transformer_options"])
        img, txt, _ = block(args["img"], args["txt"], args["vec"], seen)
        return {"img": img, "txt": txt}

    return run
