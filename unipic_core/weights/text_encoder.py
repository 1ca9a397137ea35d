"""Files of the condition encoder: the weights needed for hidden states, and checks that no config runs code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line
from .files import PathLike, Weights, open_weights, weight_file
from .formats.json_file import read_json

HEAD = "lm_head."
"""Prefix of the language-model head's weights, which are not needed."""

TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Tokenizer classes of transformers that a tokenizer_config.json may name; both read the same files."""

ENCODER_FOLDERS = ("text_encoder", "tokenizer", "processor", "image_processor")

_LARGEST_CONFIG = 10_000_000
_LARGEST = 1 << 20
_SIZES = ("_size", "_dim", "_layers", "_heads", "depth", "channels")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_BUILT_IN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_CODE = "asks to run Python code from the folder when it is loaded"
_ELSEWHERE = "names a file outside the folder's usual ones"
_REFUSED = {
    "auto_map": _CODE,
    "trust_remote_code": _CODE,
    "custom_pipelines": _CODE,
    "use_kernels": "asks for code from the Hugging Face hub",
    "quantization_config": "is quantised in a form that fetches code from the Hugging Face hub",
    "transformers_weights": _ELSEWHERE,
    "vocab_file": _ELSEWHERE,
    "merges_file": _ELSEWHERE,
    "tokenizer_file": _ELSEWHERE,
    "tokenizer_object": _ELSEWHERE,
    "fast_tokenizer_files": _ELSEWHERE,
}
"""Config keys that make other libraries run code, reach the network or read other files, with the reason to refuse."""


def encoder_parameters(weights: Weights) -> int:
    """Count the encoder's parameters without the language-model head, from the files' headers."""
    return sum(weights.count(name) for name in weights if not name.startswith(HEAD))


def check_encoder_folders(folder: Path) -> None:
    """Raise CheckpointError unless a pipeline folder has text_encoder/ and tokenizer/."""
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise CheckpointError(
                f"{folder} has no {part}/ folder; download it from a Qwen-Image-Edit or UniPic 3 repository"
            )


def open_encoder(folder: PathLike) -> Weights:
    """Open the weights of a pipeline folder's text encoder; no tensor is loaded.

    Reads every config and every index of shards in ENCODER_FOLDERS. Raises CheckpointError if loading the encoder could
    run code, reach the network or leave the folder.
    """
    folder = Path(folder)
    opened = weight_file(folder / "text_encoder")
    for part in ENCODER_FOLDERS:
        for file in sorted((folder / part).glob("*.json")):
            if file.name.endswith(".index.json"):
                if file != opened:
                    open_weights(file)
            elif file.name not in _VOCABULARIES:
                check_config(file)
    weights = folder / "text_encoder"
    if (weights / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{weights} holds an adapter_config.json, which takes the encoder's weights from another place; refused: "
            "merge the adapter into the encoder first"
        )
    loaded = open_weights(opened)
    if (weights / "config.json").is_file():
        _check_sizes(weights / "config.json", loaded)
    return loaded


def _check_sizes(file: Path, weights: Weights) -> None:
    """CheckpointError for sizes with which transformers would make up weights that are not there, layer by layer."""
    config = check_config(file)
    for key, value in _items(config):
        if type(value) is int and key.endswith(_SIZES) and not 0 <= value <= _LARGEST:
            raise CheckpointError(f"{file}: {key} should be a whole number up to {_LARGEST}, got {str(value)[:40]}")
    for key, part in (("num_hidden_layers", "layers"), ("depth", "blocks")):
        wanted = max((value for k, value in _items(config) if k == key and type(value) is int), default=0)
        numbers = {found[1] for name in weights if (found := re.search(rf"(?:^|\.){part}\.(\d+)\.", name))}
        if wanted > len(numbers):
            raise CheckpointError(
                f"{file}: {key} is {wanted}, and the weights beside it have {len(numbers)} {part}; fetch them again"
            )


def check_config(file: Path) -> Any:
    """Read a JSON config. Raises CheckpointError if it cannot be read or has a refused key."""
    try:
        content = read_json(file, _LARGEST_CONFIG)
        reason = next((r for key, value in _items(content) if (r := _refusal(key, value))), None)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deep; fetch it again") from None
    if reason:
        raise CheckpointError(f"{file} {reason}; refused, take this part from a Qwen-Image-Edit or UniPic 3 repository")
    return content


def tokenizer_class(folder: PathLike) -> str:
    """Return the transformers class for a tokenizer/ folder. Raises CheckpointError unless it is one of TOKENIZERS."""
    file = Path(folder) / "tokenizer_config.json"
    config = check_config(file) if file.is_file() else {}
    name = config.get("tokenizer_class", TOKENIZERS[0]) if isinstance(config, dict) else config
    if name not in TOKENIZERS:
        raise CheckpointError(
            f"{file}: expected the tokenizer class {' or '.join(TOKENIZERS)}, got {str(name)[:60]!r}; take the "
            "tokenizer from a Qwen-Image-Edit or UniPic 3 repository"
        )
    return TOKENIZERS[0]


@contextmanager
def readable_encoder_errors(failure: str) -> Iterator[None]:
    """Turn errors of transformers, tokenizers and safetensors into CheckpointErrors that begin with `failure`.

    A panic of their Rust code is a BaseException, which would end the program or ComfyUI's queue.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{failure}: {one_line(error)}; fetch it again") from error


def _items(content: object) -> Iterator[tuple[str, Any]]:
    """Iterate over all keys and values of a JSON value, at any depth."""
    if isinstance(content, dict):
        yield from content.items()
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _items(value)


def _refusal(key: str, value: Any) -> str | None:
    """Return the reason to refuse a key of a config; None for an allowed one."""
    if value in (None, False, "", {}, []):
        return None
    if key.endswith(("attn_implementation", "attn_implementation_internal", "experts_implementation")):
        names = list(value.values()) if isinstance(value, dict) else [value]
        foreign = next((n for n in names if n is not None and n not in _BUILT_IN_ATTENTION), None)
        return foreign and f"has {key} {str(foreign)[:80]!r}, code from the Hugging Face hub"
    if key == "quantization_config" and isinstance(value, dict) and value.get("quant_method") == "bitsandbytes":
        return None
    return f"has the key {key}: it {_REFUSED[key]}" if key in _REFUSED else None
