"""Text of the prompt: Qwen2.5-VL's chat template with the release's system message and no labels of the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError, UniPicError

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)

PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
"""Start of every encoder input; its hidden states are dropped (64 tokens with the released tokenizer)."""

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

IMAGE_PAD = "<|image_pad|>"

IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
"""Text of one reference; IMAGE_PAD is expanded to the number of its image tokens."""

LONG_PROMPT = 1024
"""Most prompt tokens that the released weights were trained with."""

PROMPT_TOKENS = 128
"""Assumed prompt tokens without those of the references; most prompts are shorter."""

SPECIAL_TOKENS = (
    *(IMAGE_PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""Texts that Qwen2.5-VL's tokenizer reads as one special token wherever they occur."""


def prompt_text(prompt: str, num_references: int) -> str:
    """Build the whole text: PREFIX, one IMAGE per reference in order, the prompt, SUFFIX.

    Raises UniPicError for a prompt that is not valid Unicode.
    """
    return PREFIX + body_text(prompt, num_references)


def body_text(prompt: str, num_references: int) -> str:
    """Build the text after PREFIX, whose hidden states are the condition."""
    check_unicode(prompt)
    return IMAGE * num_references + prompt + SUFFIX


def check_unicode(prompt: str) -> None:
    """Raise UniPicError for text that no tokenizer takes: half a surrogate pair, as from a cut emoji."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(prompt[error.start]):04X}"
        raise UniPicError(
            f"the prompt is not valid Unicode: character {error.start + 1} is {code}, half of a surrogate pair, for "
            "example of a cut emoji; remove it or type it again"
        ) from None


def special_token_in(prompt: str, tokens: Iterable[str] = SPECIAL_TOKENS) -> str | None:
    """Return the first special token that a prompt contains, None if it contains none."""
    return next((token for token in tokens if token and token in prompt), None)


def check_image_token(tokenizer_id: int | None, config_id: int) -> None:
    """Raise CheckpointError unless tokenizer and encoder config agree on the token id of IMAGE_PAD."""
    if tokenizer_id != config_id:
        raise CheckpointError(
            f"the text encoder expects {IMAGE_PAD} as token {config_id}, got {tokenizer_id} from the tokenizer; take "
            "tokenizer and text_encoder from the same folder"
        )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text in which special tokens are ordinary words. tokenizer: of the package tokenizers.

    The steps of its `encode` without the search for special tokens: normalise, split into words, tokenize each.
    """
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else [(text, None)]
    return [token.id for word, _ in words for token in tokenizer.model.tokenize(word)]


def check_length(words: int, total: int, limit: int) -> str | None:
    """Return a warning if a prompt has more tokens than the model was trained with, else None.

    words: tokens of the prompt. total: with the template and the references. Raises UniPicError if `total` is above the
    encoder's `limit`.
    """
    if total > limit:
        raise UniPicError(
            f"the prompt is too long: {words} tokens, {total} with the references and the template, at most {limit}; "
            "shorten it"
        )
    if words > LONG_PROMPT:
        return f"the prompt has {words} tokens; the model was trained up to {LONG_PROMPT}"
    return None
