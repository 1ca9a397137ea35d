"""The text encoder of a pipeline folder as ComfyUI's CLIP, and prompts with references through any Qwen2.5-VL CLIP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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

from ....unipic_core import MODELS
from ....unipic_core.conditioning.images import resize_for_vision
from ....unipic_core.conditioning.prompt import prompt_text, special_token_in
from ....unipic_core.conditioning.reference_sizes import Size, vision_size
from ....unipic_core.errors import UniPicError
from ....unipic_core.weights.files import open_weights
from ....unipic_core.weights.text_encoder import HEAD, check_encoder_folders
from ..pictures.images import to_image
from .encoder_config import EncoderConfig
from .encoder_model import TextModel
from .tokenizer import KEY, Tokenizer
from .vision_cache import shared_tower

STOCK_LEAST_PIXELS = 3136
"""ComfyUI's own Qwen2.5-VL enlarges smaller pictures to this many pixels."""

Conditioning = list[list[Any]]


EMBEDDING = "model.embed_tokens.weight"


def load_clip(folder: Path, disable_dynamic: bool = False, weights_file: Path | None = None) -> comfy.sd.CLIP:
    """The CLIP of a pipeline folder's text_encoder/ and tokenizer/; weights in their storage type.

    weights_file: weights to take in place of the folder's, as Save CLIP or Save Checkpoint wrote them. Raises
    CheckpointError that names the missing, damaged or unsuitable part.
    """
    folder = Path(folder)
    check_encoder_folders(folder)
    config = EncoderConfig.read(folder / "text_encoder" / "config.json")
    tokenizer = Tokenizer.read(folder / "tokenizer", config.image_token, config.text["max_position_embeddings"])
    weights = saved_weights(weights_file) if weights_file else read_encoder_weights(folder / "text_encoder")
    target = comfy.supported_models_base.ClipTarget(lambda **_: tokenizer, partial(TextModel, config, tokenizer))
    clip = comfy.sd.CLIP(
        target,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options=_options(weights),
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_load_patcher, (folder, weights_file))
    return clip


def _load_patcher(folder: Path, weights_file: Path | None, disable_dynamic: bool = False) -> Any:
    return load_clip(folder, disable_dynamic, weights_file).patcher


def bundled_folder(embedding: Sequence[int]) -> Path | None:
    """The bundled model whose encoder has an embedding of this shape: a file of its weights has no tokenizer."""
    for folder in sorted(path.parent for path in MODELS.glob("*/text_encoder")):
        weights = open_weights(folder / "text_encoder")
        if any(weights.shape(name) == tuple(embedding) for name in weights if comfy_name(name) == EMBEDDING):
            return folder
    return None


def load_saved(path: Path, embeddings: list[str]) -> comfy.sd.CLIP:
    """ComfyUI's own CLIP of a file that Save CLIP or Save Checkpoint wrote, which Load CLIP does not recognise."""
    kind = comfy.sd.CLIPType.QWEN_IMAGE
    return comfy.sd.load_text_encoder_state_dicts([saved_weights(path)], embeddings, kind)


def saved_prefix(names: Iterable[str]) -> str:
    """Prefix of an encoder's names in a file of Save CLIP or Save Checkpoint; "" for names as Load CLIP reads them."""
    found = (re.fullmatch(r"(.*?)model\.(?:language_model\.)?embed_tokens\.weight", name) for name in names)
    return next((match[1] for match in found if match), "")


def saved_weights(path: Path) -> dict[str, Tensor]:
    """An encoder's weights by ComfyUI's names, without the prefix under which a file has them."""
    stored = comfy.utils.load_torch_file(str(path), safe_load=True)
    prefix = saved_prefix(stored)
    names = {name: comfy_name(name[len(prefix) :]) for name in stored if name.startswith(prefix)}
    return {name: stored[old] for old, name in names.items() if not name.startswith(HEAD)}


def _options(weights: dict[str, Tensor]) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": weights["model.norm.weight"].dtype} if "model.norm.weight" in weights else {}
    quantised = comfy.utils.detect_layer_quantization(weights, "")
    return {**options, "quantization_metadata": quantised} if quantised else options


def read_encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Weights in transformers' layout, sharded or not, by ComfyUI's names. CheckpointError if they cannot be read."""
    weights = open_weights(folder)
    files = sorted(weights.files)
    if all(file.suffix == ".safetensors" for file in files):
        # ComfyUI's reader: its offloading needs the weights' places in the files
        parts = [comfy.utils.load_torch_file(str(file), safe_load=True) for file in files]
        stored = {name: weight for part in parts for name, weight in part.items()}
    else:
        stored = {name: weights.get(name) for name in weights}
    return {comfy_name(name): weight for name, weight in stored.items() if not name.startswith(HEAD)}


def comfy_name(name: str) -> str:
    """ComfyUI's name of a weight: model.X and visual.X, as in older transformers.

    Newer transformers write model.language_model.X and model.visual.X.
    """
    return re.sub(r"^model\.visual\.", "visual.", re.sub(r"^model\.language_model\.", "model.", name))


def encode_prompt(clip: CLIP, prompt: str, references: Sequence[Image.Image]) -> Conditioning:
    """Conditioning in the release's template: the references in order, without labels, then the prompt.

    clip: from `load_clip`, or ComfyUI's own Qwen2.5-VL. references: from `resize_references`; the vision tower gets
    them at exactly 28/32 of their sides, once for all texts. Raises UniPicError for another kind of CLIP, and for
    special tokens in a prompt for ComfyUI's own, which would not read them as text.
    """
    text = prompt_text(prompt, len(references))  # begins with <|im_start|>, so no tokenizer adds a template
    pictures = [resize_for_vision(reference) for reference in references]
    plain: dict[str, str] = {"prompt": prompt}
    if not isinstance(clip.tokenizer, Tokenizer):
        _check_marks(prompt)
        text, plain = _escaped(text), {}
    tokens = clip.tokenize(text, images=[to_image(picture) for picture in pictures], **plain)
    _check_tokens(tokens, len(references))
    with nullcontext() if changes_weights(clip) else shared_tower(clip):
        return clip.encode_from_tokens_scheduled(tokens)


def changes_weights(clip: CLIP) -> bool:
    """True if hooks may change a CLIP's weights while it encodes, so that no result may be cached."""
    return bool(clip.patcher.forced_hooks or clip.apply_hooks_to_conds or clip.use_clip_schedule)


def _check_marks(prompt: str) -> None:
    """UniPicError for a special token in the prompt, which ComfyUI's own tokenizers would not read as text."""
    if mark := special_token_in(prompt):
        raise UniPicError(
            f"the prompt contains {mark}, a special token for this text encoder; remove it, or use the CLIP of Load "
            "UniPic, which reads it as text"
        )


def _escaped(text: str) -> str:
    """Double the backslash before a bracket, which ComfyUI's own tokenizers drop as an escape."""
    return re.sub(r"\\([()])", r"\\\\\1", text)


def enlarged_references(clip: CLIP, seen: Sequence[Size]) -> list[str]:
    """Warning of references, by their sizes after resizing, that ComfyUI's own Qwen2.5-VL enlarges."""
    stock = not isinstance(clip.tokenizer, Tokenizer)
    return [
        f"ComfyUI's own text encoder enlarges a reference of {width}x{height} pixels, so the result differs a little "
        "from the release; raise reference_budget, or use the CLIP of Load UniPic"
        for width, height in map(vision_size, seen)
        if stock and width * height < STOCK_LEAST_PIXELS
    ][:1]


def _check_tokens(tokens: Any, num_references: int) -> None:
    kinds = sorted(tokens) if isinstance(tokens, dict) else []
    if kinds != [KEY]:
        raise UniPicError(
            f"clip must be a Qwen2.5-VL, got one with tokens for {', '.join(kinds) or type(tokens).__name__}; use the "
            "CLIP of Load UniPic, or Load CLIP with a Qwen2.5-VL 7B and type qwen_image"
        )
    images = sum(isinstance(pair[0], dict) for row in tokens[KEY] for pair in row)
    if images != num_references:
        raise UniPicError(
            f"clip must see all {num_references} pictures, it saw {images}; choose type qwen_image in Load CLIP"
        )
