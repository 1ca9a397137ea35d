"""Qwen2.5-VL of any size from ComfyUI's classes, so that offloading and quantisation work as on the 7B."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from comfy import sd1_clip
from comfy.text_encoders import llama, qwen_vl
from torch import Tensor

from ....unipic_core.conditioning.vision import MERGE, PATCH, grid_thw, vision_patches
from ....unipic_core.errors import CheckpointError, joined_lines
from .encoder_config import EncoderConfig
from .tokenizer import KEY, Tokenizer

SIDE = MERGE * PATCH
"""Sides of pictures for the vision tower are multiples of this many pixels."""


class Qwen25VL(llama.Qwen25_7BVLI):
    """ComfyUI's Qwen2.5-VL with the sizes and the kind of positions of a config."""

    def __init__(
        self, config: EncoderConfig, _: dict[str, Any], dtype: object, device: object, operations: object
    ) -> None:
        torch.nn.Module.__init__(self)  # not the parent's, which builds the 7B
        sizes = llama.Qwen25_7BVLI_Config(**config.text)
        sizes.head_dim, sizes.rope_dims = config.head_dim, config.rope_dims
        self.num_layers = sizes.num_hidden_layers
        self.dtype = dtype
        self.sequential = config.positions == "sequential"
        self.model = llama.Llama2_(sizes, device=device, dtype=dtype, ops=operations)
        self.visual = qwen_vl.Qwen2VLVisionTransformer(**config.vision, device=device, dtype=dtype, ops=operations)
        self.visual.fullatt_block_indexes = config.full_attention

    def preprocess_embed(self, embed: dict[str, Any], device: object) -> tuple[Tensor | None, Tensor | None]:
        """An image [1, H, W, 3] in [0, 1] -> its tokens [H/28 * W/28, hidden] and its grid of patches [1, 3].

        ComfyUI's preparation enlarges pictures under 3136 pixels, which would give small models other tokens.
        """
        if embed["type"] != "image":
            return None, None
        pictures = to_vision_size(embed["data"][:1, ..., :3].movedim(-1, 1).to(device, torch.float32))
        grid = torch.tensor([grid_thw(*pictures.shape[-2:])])
        return self.visual(vision_patches(pictures)[0], grid), grid

    def forward(self, *args: object, embeds_info: object = (), **kwargs: object) -> Any:
        # without embeds_info the parent numbers tokens one by one
        return super().forward(*args, embeds_info=[] if self.sequential else embeds_info, **kwargs)


def to_vision_size(pictures: Tensor) -> Tensor:
    """Resize [B, 3, H, W] to the nearest multiples of 28; multiples, such as the node's, stay as they are."""
    height, width = (max(round(side / SIDE), 1) * SIDE for side in pictures.shape[-2:])
    if pictures.shape[-2:] == (height, width):
        return pictures
    return F.interpolate(pictures, size=(height, width), mode="bilinear", align_corners=False)


class TextModel(sd1_clip.SD1ClipModel):
    """Text encoder in a CLIP: hidden states without those of the template's prefix."""

    def __init__(
        self, config: EncoderConfig, tokenizer: Tokenizer, *, device: object, dtype: object, model_options: object
    ):
        super().__init__(
            device=device,
            dtype=dtype,
            name=KEY,
            clip_model=partial(_hidden_states, config, tokenizer.pad),
            model_options=model_options,
        )
        self.tokenizer = tokenizer

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Hidden states [1, L, hidden] float32; extra holds a mask only if a token is masked."""
        hidden, pooled, extra = super().encode_token_weights(tokens)
        start = self.tokenizer.dropped([pair[0] for pair in tokens[KEY][0]])
        mask = extra["attention_mask"][:, start:]
        others = {k: v for k, v in extra.items() if k != "attention_mask"}
        return hidden[:, start:], pooled, others if bool(mask.all()) else {**others, "attention_mask": mask}

    def load_sd(self, sd: dict[str, Tensor]) -> Any:
        """Load weights. CheckpointError for those that do not fit, which ComfyUI would only log."""
        try:
            missing, unexpected = super().load_sd(sd)
        except RuntimeError as error:
            detail = joined_lines(error, 300)
            raise CheckpointError(
                f"the text encoder's weights do not fit its config.json ({detail}); download the text_encoder folder "
                "again"
            ) from error
        if missing:
            names = ", ".join(sorted(missing)[:3])
            raise CheckpointError(
                f"the text encoder lacks {len(missing)} weights ({names}); download the text_encoder folder again"
            )
        return missing, unexpected


def _hidden_states(config: EncoderConfig, pad: int | None, **kwargs: object) -> sd1_clip.SDClipModel:
    return sd1_clip.SDClipModel(
        layer="last",
        textmodel_json_config={},
        special_tokens={} if pad is None else {"pad": pad},
        layer_norm_hidden_state=False,
        model_class=partial(Qwen25VL, config),
        enable_attention_masks=True,
        return_attention_masks=True,
        **kwargs,
    )
