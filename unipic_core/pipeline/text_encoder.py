"""Condition encoder: the last hidden states of transformers' Qwen2.5-VL, given references and prompt."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..conditioning.images import resize_for_vision
from ..conditioning.prompt import (
    IMAGE,
    IMAGE_PAD,
    PREFIX,
    SUFFIX,
    body_text,
    check_image_token,
    check_length,
    plain_ids,
    special_token_in,
)
from ..conditioning.reference_sizes import REFERENCE_MULTIPLE, vision_size
from ..conditioning.sequence import TextCond
from ..conditioning.vision import FRAMES, MERGE, PATCH, POSITIONS, encoder_positions, grid_thw
from ..errors import CheckpointError, UniPicError
from ..weights.text_encoder import HEAD, check_encoder_folders, open_encoder, readable_encoder_errors, tokenizer_class

EncoderInputs = dict[str, Tensor]
"""CPU tensors of a batch: input_ids and attention_mask [B, L] long, padded right; pixel_values [P, 1176] float32, the
patches of all images; image_grid_thw [images, 3] long. Without images the last two have no rows."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained` call: no downloads, no code from the folder."""


class TextEncoder:
    """Encodes references and prompts to a TextCond. Differentiable: callers choose torch.no_grad.

    positions: one of POSITIONS; None = the model config's `unipic_positions`, else the numbering of the version of
    transformers that wrote the config (multimodal for the released weights).
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any = None, positions: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor if image_processor is not None else image_processor_class()()
        self.positions = positions or positions_of(model.config)
        if self.positions not in POSITIONS:
            raise UniPicError(f"the encoder's positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        self.image_token = int(model.config.image_token_id)
        check_image_token(tokenizer.convert_tokens_to_ids(IMAGE_PAD), self.image_token)
        self.prefix_ids: list[int] = self._token_ids(PREFIX)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> TextEncoder:
        """Load from a pipeline folder's text_encoder/, tokenizer/ and processor/. Raises CheckpointError."""
        folder = Path(folder)
        check_encoder_folders(folder)
        open_encoder(folder)
        return cls.from_checked(folder, dtype, device)

    @classmethod
    def from_checked(
        cls, folder: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> TextEncoder:
        """Load like `from_pretrained`, from a folder that `open_encoder` has already checked."""
        with readable_encoder_errors(f"the encoder in {folder} cannot be loaded"):
            tokenizer = load_tokenizer(folder / "tokenizer")
            model = _load_model(folder / "text_encoder", dtype, torch.device(device))
            processor = _image_processor(folder)
        return cls(model.eval().requires_grad_(False), tokenizer, processor)

    @property
    def network(self) -> Any:
        """The encoder without its language-model head."""
        return getattr(self.model, "model", self.model)

    @property
    def device(self) -> torch.device:
        return self.network.get_input_embeddings().weight.device

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder to a device; the unused language-model head stays where it is."""
        self.network.to(device)
        return self

    @property
    def dropped(self) -> int:
        """Number of tokens of PREFIX, whose hidden states are dropped: 64 with the released tokenizer."""
        return len(self.prefix_ids)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def encode(
        self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], vision: Tensor | None = None
    ) -> TextCond:
        """Encode B samples to embeds [B, L, D] and mask. images: each sample's references from `resize_references`.

        vision: result of `vision` for the same images, to encode another prompt without running the vision tower again.
        """
        words = self._words(images, prompts)
        return self.forward(words, self.vision(images) if vision is None else vision)

    def vision(self, images: Sequence[Sequence[Image.Image]]) -> Tensor:
        """Run the vision tower on the references: [N, D], the N image tokens of all samples in order."""
        return self.vision_of(self._pixels(images))

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> EncoderInputs:
        """Prepare the inputs of `forward` on the CPU; they can be cached, and batched by `collate`."""
        return {**self._words(images, prompts), **self._pixels(images)}

    def collate(self, samples: Sequence[EncoderInputs]) -> EncoderInputs:
        """Join prepared inputs of several batches, padded right."""
        rows = [r[m.bool()] for s in samples for r, m in zip(s["input_ids"], s["attention_mask"], strict=True)]
        pictures = {k: torch.cat([s[k] for s in samples]) for k in ("pixel_values", "image_grid_thw")}
        return {**self._padded(rows), **pictures}

    def vision_of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the vision tower on the pixel_values and image_grid_thw of prepared inputs: [N, D] for N image tokens."""
        grid, width = inputs["image_grid_thw"], self.network.get_input_embeddings().weight.shape[1]
        if not len(grid):
            return torch.empty(0, width, device=self.device)
        pixels = inputs["pixel_values"].to(self.device)
        return torch.cat(self.network.get_image_features(pixels, grid.to(self.device), return_dict=True).pooler_output)

    def forward(self, inputs: EncoderInputs, vision: Tensor | None = None) -> TextCond:
        """Hidden states of prepared inputs without those of the prefix; mask None if nothing is padded.

        vision: result of `vision_of` for the same pictures; pixel_values are then not needed.
        """
        ids, mask, device = inputs["input_ids"], inputs["attention_mask"], self.device
        embeds = self.network.get_input_embeddings()(ids.to(device))
        vision = self.vision_of(inputs) if vision is None else vision
        if len(vision):
            images = (ids == self.image_token).to(device)[..., None]
            embeds = embeds.masked_scatter(images, vision.to(embeds))
        padded = not bool(mask.all())
        hidden = self.network(
            inputs_embeds=embeds,
            attention_mask=mask.to(device),
            position_ids=self.position_ids(ids, inputs["image_grid_thw"]).to(device),
            use_cache=False,
        ).last_hidden_state
        text_mask = mask[:, self.dropped :].bool().to(device) if padded else None
        return TextCond(hidden[:, self.dropped :], text_mask)

    def position_ids(self, ids: Tensor, grid: Tensor) -> Tensor:
        """RoPE positions [3, B, L] of right-padded ids [B, L]; the padding continues the count.

        multimodal: text advances by one on all three axes; an image of h x w tokens starting at p has (p, p + row,
        p + column), and the text after it starts at p + max(h, w) (Qwen2.5-VL, section 2.1.2).
        """
        batch, length = ids.shape
        if self.positions == "sequential" or not len(grid):
            return torch.arange(length).expand(3, batch, length)
        merge = self.model.config.vision_config.spatial_merge_size
        sizes = iter((grid[:, 1:] // merge).tolist())
        return torch.stack([self._multimodal_positions(row.tolist(), sizes) for row in ids.cpu()], dim=1)

    def _multimodal_positions(self, ids: list[int], sizes: Any) -> Tensor:
        pieces, start, at = [], 0, 0
        while at < len(ids):
            if ids[at] == self.image_token:
                h, w = next(sizes)
                rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
                pieces.append(torch.stack([torch.zeros_like(rows), rows, columns]) + start)
                start, at = start + max(h, w), at + h * w
            else:
                run = at
                while at < len(ids) and ids[at] != self.image_token:
                    at += 1
                pieces.append((torch.arange(at - run) + start).expand(3, -1))
                start += at - run
        return torch.cat(pieces, dim=1)

    def _words(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> EncoderInputs:
        """Prepared inputs that depend only on prompts and picture sizes: all but pixel_values."""
        if len(images) != len(prompts):
            raise UniPicError(
                f"expected one list of images for each of {len(prompts)} prompts, got {len(images)}; pass [] for none"
            )
        grids = [_grids(some) for some in images]
        counts = [(grid.prod(-1) // MERGE**2).tolist() for grid in grids]
        rows = [torch.tensor(self.prompt_ids(p, c)) for p, c in zip(prompts, counts, strict=True)]
        return {**self._padded(rows), "image_grid_thw": torch.cat(grids)}

    def _pixels(self, images: Sequence[Sequence[Image.Image]]) -> EncoderInputs:
        """Prepared inputs that do not depend on the prompt: pixel_values and image_grid_thw."""
        references = [image for some in images for image in some]
        grids = _grids(references)
        values = torch.empty(0, 3 * FRAMES * PATCH**2)
        if references:
            pictures = [resize_for_vision(image) for image in references]
            values = self.image_processor(images=pictures, do_resize=False, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "image_grid_thw": grids}

    def _padded(self, rows: Sequence[Tensor]) -> EncoderInputs:
        """Pad rows of ids on the right: input_ids and attention_mask."""
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(r) for r in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def prompt_ids(self, prompt: str, image_tokens: list[int]) -> list[int]:
        """Tokenize a prompt; IMAGE_PAD is repeated image_tokens[i] times for reference i.

        Prefix and body are tokenized separately, so no token spans the cut. Special tokens of the tokenizer in the
        prompt are ordinary text.
        """
        counts = iter(image_tokens)
        body: list[int] = []
        for token in self._body_ids(prompt, len(image_tokens)):
            body.extend([token] * (next(counts) if token == self.image_token else 1))
        self._check_length(len(body) - sum(image_tokens), sum(image_tokens))
        return self.prefix_ids + body

    def _body_ids(self, prompt: str, images: int) -> list[int]:
        text = body_text(prompt, images)
        if special_token_in(prompt, self.tokenizer.get_added_vocab()) is None:
            return self._token_ids(text)
        with readable_encoder_errors("the tokenizer cannot read this text; its files are damaged"):
            words = plain_ids(self.tokenizer.backend_tokenizer, prompt)
        return [*self._token_ids(IMAGE * images), *words, *self._token_ids(SUFFIX)]

    def _check_length(self, words: int, images: int) -> None:
        config = getattr(self.model.config, "text_config", self.model.config)
        limit, total = config.max_position_embeddings, self.dropped + words + images
        if caution := check_length(words, total, limit):
            warnings.warn(caution, stacklevel=2)

    def _token_ids(self, text: str) -> list[int]:
        with readable_encoder_errors("the tokenizer cannot read this text; its files are damaged"):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _grids(references: Sequence[Image.Image]) -> Tensor:
    """Patches of each picture over (time, height, width): [images, 3]."""
    wrong = next((i.size for i in references if any(side % REFERENCE_MULTIPLE for side in i.size)), None)
    if wrong:
        raise UniPicError(
            f"the encoder's pictures must have sides of multiples of {REFERENCE_MULTIPLE}, got {wrong[0]}x{wrong[1]}; "
            "resize them with resize_references"
        )
    sizes = [vision_size(image.size) for image in references]
    return torch.tensor([grid_thw(height, width) for width, height in sizes], dtype=torch.long).reshape(-1, 3)


def positions_of(config: object) -> str:
    """Read an encoder's positions, one of POSITIONS, from its config."""
    version = getattr(config, "transformers_version", None)
    return encoder_positions(getattr(config, "unipic_positions", None), version and str(version))


def image_processor_class() -> Any:
    """Import transformers' Qwen2-VL image processor that needs no torchvision; its module depends on the version."""
    package = "transformers.models.qwen2_vl"
    for module, name in (
        (f"{package}.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
        (f"{package}.image_processing_qwen2_vl", "Qwen2VLImageProcessor"),
    ):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError("this version of transformers has no Qwen2-VL image processor; install transformers 5")


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer/ folder with one of two known classes of transformers; no code from the folder runs."""
    import transformers

    return getattr(transformers, tokenizer_class(folder)).from_pretrained(folder, **LOCAL)


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the model to the device. Raises CheckpointError for missing weights, which transformers would randomise."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        device_map=None if device.type == "cpu" else {"": device},
        **LOCAL,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(HEAD))
    if missing:
        raise CheckpointError(
            f"{folder} does not fit Qwen2.5-VL: {len(missing)} missing ({', '.join(missing[:3])}); download it again"
        )
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        model.lm_head.to("cpu")
    return model


def _image_processor(folder: Path) -> Any:
    kind = image_processor_class()
    for part in ("processor", "image_processor", "text_encoder"):
        if (folder / part / "preprocessor_config.json").is_file():
            return kind.from_pretrained(folder / part, **LOCAL)
    return kind()
