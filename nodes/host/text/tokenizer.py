"""Tokenizer of a pipeline folder with ComfyUI's interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from comfy.text_encoders import qwen_image
from torch import Tensor

from ....unipic_core.conditioning.prompt import (
    IMAGE,
    IMAGE_PAD,
    PREFIX,
    SUFFIX,
    check_image_token,
    check_length,
    check_unicode,
    plain_ids,
    special_token_in,
)
from ....unipic_core.conditioning.vision import vision_tokens
from ....unipic_core.weights.text_encoder import readable_encoder_errors, tokenizer_class

KEY = "qwen25_7b"
"""ComfyUI's name for Qwen2.5-VL, whatever its size: key of the tokens, and prefix of the encoder's LoRA keys."""

_TURN = "<|im_start|>"
_USER = "user\n"
_PAD = "<|endoftext|>"
_JSON = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """ids: of a text, with nothing added. plain_ids: of a text whose special tokens are ordinary words. marks: the
    special tokens that `ids` recognises. id_of: id of a special token, or None. decode(ids, skip_special_tokens)."""

    ids: Callable[[str], list[int]]
    plain_ids: Callable[[str], list[int]]
    marks: frozenset[str]
    id_of: Callable[[str], int | None]
    decode: Callable[[Sequence[int], bool], str]

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """Read a tokenizer/ folder; nothing is downloaded. CheckpointError.

        tokenizer.json may also lie in processor/ beside it. It is read without transformers, whose versions disagree
        about tokenizer_config.json. A folder with vocab.json and merges.txt alone is read by ComfyUI's class.
        """
        file = next((f for f in (folder / _JSON, folder.parent / "processor" / _JSON) if f.is_file()), None)
        with readable_encoder_errors(f"the tokenizer in {folder} cannot be loaded"):
            return cls._of_json(file) if file else cls._of_lists(folder)

    @classmethod
    def _of_json(cls, file: Path) -> Vocabulary:
        words = tokenizers.Tokenizer.from_file(str(file))
        words.no_truncation()
        words.no_padding()

        def ids(text: str) -> list[int]:
            with readable_encoder_errors(f"the tokenizer {file} cannot read this text; it is damaged"):
                return list(words.encode(text, add_special_tokens=False).ids)

        def plain(text: str) -> list[int]:
            with readable_encoder_errors(f"the tokenizer {file} cannot read this text; it is damaged"):
                return plain_ids(words, text)

        marks = frozenset(token.content for token in words.get_added_tokens_decoder().values())
        return cls(ids, plain, marks, words.token_to_id, words.decode)

    @classmethod
    def _of_lists(cls, folder: Path) -> Vocabulary:
        tokenizer_class(folder)  # refuses a folder with code
        words = qwen_image.Qwen2Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

        def decode(ids: Sequence[int], skip_special_tokens: bool) -> str:
            return words.decode(ids, skip_special_tokens=skip_special_tokens)

        def ids(text: str) -> list[int]:
            return list(words(text, add_special_tokens=False)["input_ids"])

        plain = partial(plain_ids, words.backend_tokenizer)
        return cls(ids, plain, frozenset(words.get_added_vocab()), words.convert_tokens_to_ids, decode)


class Tokenizer:
    """Tokenizer with ComfyUI's interface: text and images -> {KEY: [[(id or image, weight 1.0), ...]]}.

    Prompt weights "(word:1.2)" and "embedding:" are ordinary text, as they were in the model's training.
    """

    def __init__(self, vocabulary: Vocabulary, image_token: int, max_length: int) -> None:
        self.vocabulary = vocabulary
        self.image_token = image_token
        self.max_length = max_length
        check_image_token(vocabulary.id_of(IMAGE_PAD), image_token)
        self.turn = vocabulary.id_of(_TURN)
        self.user = list(vocabulary.ids(_USER))
        self.pad = vocabulary.id_of(_PAD)

    @classmethod
    def read(cls, folder: Path, image_token: int, max_length: int) -> Tokenizer:
        """Read a tokenizer/ folder. max_length: most tokens that the encoder takes. CheckpointError."""
        return cls(Vocabulary.read(folder), image_token, max_length)

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        llama_template: str | None = None,
        images: Sequence[Tensor] = (),
        prompt: str = "",
        **_: object,
    ) -> dict[str, list[list[tuple[Any, ...]]]]:
        """Tokens as ComfyUI's nodes expect them. images: [1, H, W, 3] in [0, 1], one for each IMAGE_PAD in order.
        prompt: the user's part of the text, before SUFFIX: special tokens in it are ordinary text.

        A text that begins with <|im_start|> is complete; else it is put into llama_template, or without one into the
        release's template (one IMAGE per picture, no labels). UniPicError for text that is not valid Unicode.
        """
        check_unicode(text)
        if text.startswith(_TURN):
            whole = text
        elif llama_template is not None:
            whole = llama_template.format(text)
        else:
            whole = PREFIX + IMAGE * len(images) + text + SUFFIX
        waiting = iter(images)
        tokens = [self._with_image(token, waiting) for token in self._split_ids(whole, prompt)]
        self._check_length(tokens)
        weighted = [(t, 1.0, i + 1) if return_word_ids else (t, 1.0) for i, t in enumerate(tokens)]
        return {KEY: [weighted]}

    def dropped(self, tokens: Sequence[object]) -> int:
        """Number of prefix tokens to drop: up to "user" and the line break of the second turn."""
        turns = [i for i, token in enumerate(tokens) if isinstance(token, int) and token == self.turn]
        if len(turns) < 2:
            return 0
        start = turns[1] + 1
        named = list(tokens[start : start + len(self.user)]) == self.user
        return start + len(self.user) if named else turns[1]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.vocabulary.decode(token_ids, skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: the tokenizer is not saved with the weights."""
        return {}

    def _split_ids(self, text: str, prompt: str) -> list[int]:
        """Ids, with the prefix tokenized apart, so that no token spans the cut; so is a prompt with special tokens."""
        ids = self.vocabulary.ids
        if special_token_in(prompt, self.vocabulary.marks) and text.endswith(prompt + SUFFIX):
            before = text[: -len(prompt + SUFFIX)]
            return [*self._split_ids(before, ""), *self.vocabulary.plain_ids(prompt), *ids(SUFFIX)]
        return [*ids(PREFIX), *ids(text[len(PREFIX) :])] if text.startswith(PREFIX) else list(ids(text))

    def _with_image(self, token: int, waiting: Any) -> Any:
        image = next(waiting, None) if token == self.image_token else None
        return token if image is None else {"type": "image", "data": image, "original_type": "image"}

    def _check_length(self, tokens: Sequence[Any]) -> None:
        words = [token for token in tokens if isinstance(token, int)]
        shapes = [token["data"].shape for token in tokens if not isinstance(token, int)]
        total = len(words) + sum(vision_tokens(shape[1], shape[2]) for shape in shapes)
        if caution := check_length(len(words) - self.dropped(tokens), total, self.max_length):
            logging.warning("UniPic: %s", caution)
