"""CLIP: the condition encoder of a pipeline folder as ComfyUI's own kind, and prompts with references through any."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.utils
from comfy.sd import CLIP
from PIL import Image
from torch import Tensor

from ....unipic_core.conditioning.images import resize_for_vision
from ....unipic_core.conditioning.prompt import mark_in, prompt_text
from ....unipic_core.errors import CheckpointError, UniPicError
from ....unipic_core.weights.files import open_weights
from ....unipic_core.weights.text_encoder import HEAD
from ..pictures.images import to_image
from .encoder_config import EncoderConfig
from .encoder_model import TextModel
from .tokenizer import KEY, Tokenizer
from .vision_cache import shared_tower

STOCK_LEAST_PIXELS = 3136
"""ComfyUI's own Qwen2.5-VL enlarges pictures of fewer pixels."""

Conditioning = list[list[Any]]


def load_clip(folder: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """The CLIP of a pipeline folder's text_encoder/ and tokenizer/; weights in the type they are stored in.

    Raises CheckpointError naming what is missing, damaged or does not fit.
    """
    folder = Path(folder)
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} has no {part}/ folder; download it from a Qwen-Image-Edit or UniPic 3 repository"
            )
    config = EncoderConfig.read(folder / "text_encoder" / "config.json")
    tokenizer = Tokenizer.read(folder / "tokenizer", config.image_token, config.text["max_position_embeddings"])
    weights = read_encoder_weights(folder / "text_encoder")
    target = comfy.supported_models_base.ClipTarget(lambda **_: tokenizer, partial(TextModel, config, tokenizer))
    clip = comfy.sd.CLIP(
        target,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options=_options(weights),
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_load_patcher, (folder,))
    return clip


def _load_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    return load_clip(folder, disable_dynamic).patcher


def _options(weights: dict[str, Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": weights["model.norm.weight"].dtype} if "model.norm.weight" in weights else {}
    quantised = comfy.utils.detect_layer_quantization(weights, "")
    return {**options, "quantization_metadata": quantised} if quantised else options


def read_encoder_weights(folder: Path) -> dict[str, Tensor]:
    """transformers' weights, sharded or not, by ComfyUI's names. CheckpointError for what is not readable weights."""
    checked = open_weights(folder)
    files = sorted(checked.files)
    if all(file.suffix == ".safetensors" for file in files):
        # ComfyUI's reader, since its offloading wants to know where in the files the weights lie
        parts = [comfy.utils.load_torch_file(str(file), safe_load=True) for file in files]
        stored = {name: weight for part in parts for name, weight in part.items()}
    else:
        stored = {name: checked.get(name) for name in checked}
    return {comfy_name(name): weight for name, weight in stored.items() if not name.startswith(HEAD)}


def comfy_name(name: str) -> str:
    """Older transformers: model.X and visual.X, as ComfyUI; newer: model.language_model.X and model.visual.X."""
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def encode_prompt(clip: CLIP, prompt: str, references: Sequence[Image.Image]) -> Conditioning:
    """Conditioning of the release's template: references in order, no labels, the prompt.

    clip: from `load_clip`, or ComfyUI's own Qwen2.5-VL. references: from `resize_references`; the vision encoder gets
    them at exactly 28/32 of their sides, once for all texts. Raises UniPicError for another kind of CLIP, and for marks
    in the prompt of ComfyUI's own, which would not stay text.
    """
    text = prompt_text(prompt, len(references))  # begins with a turn: every tokenizer takes such a text as it is
    pictures = [resize_for_vision(reference) for reference in references]
    plain: dict[str, str] = {"prompt": prompt}
    if not isinstance(clip.tokenizer, Tokenizer):
        _check_marks(prompt)
        text, plain = _escaped(text), {}
        _warn_of_enlarging(pictures)
    tokens = clip.tokenize(text, images=[to_image(picture) for picture in pictures], **plain)
    _check_tokens(tokens, len(references))
    with nullcontext() if changes_weights(clip) else shared_tower(clip):
        return clip.encode_from_tokens_scheduled(tokens)


def changes_weights(clip: CLIP) -> bool:
    """Whether hooks may change a CLIP's weights while it encodes, so that nothing of it may be kept."""
    return bool(clip.patcher.forced_hooks or clip.apply_hooks_to_conds or clip.use_clip_schedule)


def _check_marks(prompt: str) -> None:
    """UniPicError for a prompt that ComfyUI's own tokenizers would read as more than text."""
    if mark := mark_in(prompt):
        raise UniPicError(
            f"the prompt contains {mark}, a mark of the template to this text encoder; remove it, or take the CLIP "
            "from Load UniPic, to which it is text"
        )


def _escaped(text: str) -> str:
    """ComfyUI's own tokenizers read a backslash before a bracket as an escape and drop it."""
    return re.sub(r"\\([()])", r"\\\\\1", text)


def _warn_of_enlarging(pictures: Sequence[Image.Image]) -> None:
    small = next((p.size for p in pictures if p.width * p.height < STOCK_LEAST_PIXELS), None)
    if small:
        logging.warning(
            "UniPic: ComfyUI's own text encoder enlarges a reference of %dx%d pixels; results differ a little from the "
            "release. Raise reference_budget, or take the CLIP from Load UniPic.",
            *small,
        )


def _check_tokens(tokens: Any, num_references: int) -> None:
    kinds = sorted(tokens) if isinstance(tokens, dict) else []
    if kinds != [KEY]:
        raise UniPicError(
            f"clip must be a Qwen2.5-VL, got one that makes {', '.join(kinds) or type(tokens).__name__}; take it from "
            "Load UniPic, or load a Qwen2.5-VL 7B with Load CLIP and type qwen_image"
        )
    images = sum(isinstance(pair[0], dict) for row in tokens[KEY] for pair in row)
    if images != num_references:
        raise UniPicError(f"this CLIP took {images} of {num_references} references; load it with type qwen_image")
