"""The prompt's text, in one place: Qwen2.5-VL's chat template with the release's system message and no labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import UniPicError

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)

PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
"""What the condition encoder reads first; its hidden states are dropped (64 tokens with the released tokenizer)."""

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

IMAGE_PAD = "<|image_pad|>"

IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
"""One reference; IMAGE_PAD stands for as many tokens as the vision encoder gives."""

LONG_PROMPT = 1024
"""Prompt tokens beyond which the released weights were not trained."""

MARKS = (
    *(IMAGE_PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
"""Texts that Qwen2.5-VL's tokenizer reads as one token of its own, wherever they stand."""


def prompt_text(prompt: str, num_references: int) -> str:
    """The whole text: PREFIX, one IMAGE per reference in order, the prompt, SUFFIX.

    Raises UniPicError when the prompt is not valid Unicode.
    """
    return PREFIX + body_text(prompt, num_references)


def body_text(prompt: str, num_references: int) -> str:
    """What follows PREFIX: the part whose hidden states are kept."""
    check_unicode(prompt)
    return IMAGE * num_references + prompt + SUFFIX


def check_unicode(prompt: str) -> None:
    """UniPicError for a text that no tokenizer takes: with half of a surrogate pair, as a cut emoji or the bytes of
    another encoding leave it."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(prompt[error.start]):04X}"
        raise UniPicError(
            f"the prompt is not valid Unicode: character {error.start + 1} is {code}, half of a pair, as of an emoji "
            "that was cut; remove it or type it again"
        ) from None


def mark_in(prompt: str, marks: Iterable[str] = MARKS) -> str | None:
    """The first mark that a prompt contains, None if it contains none."""
    return next((mark for mark in marks if mark and mark in prompt), None)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text in which marks are ordinary words. tokenizer: of the package tokenizers.

    The steps of its `encode` without the search for marks: normalise, split into words, tokenize each.
    """
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else [(text, None)]
    return [token.id for word, _ in words for token in tokenizer.model.tokenize(word)]


def check_length(words: int, total: int, limit: int) -> str | None:
    """What to warn of, if a prompt has more tokens of text than the model was trained with.

    total: with the template and the references. Raises UniPicError where that is more than the encoder's limit.
    """
    if total > limit:
        raise UniPicError(
            f"the prompt is too long: {words} tokens of text, with the references and the template {total}, "
            f"of at most {limit}; shorten it"
        )
    if words > LONG_PROMPT:
        return f"the prompt has {words} tokens; the model was trained up to {LONG_PROMPT}"
    return None
