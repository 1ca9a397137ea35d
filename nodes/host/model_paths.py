"""Folders of models: the bundled ones, released folders, and ComfyUI's folders of single files. Nothing is downloaded.

A name from a workflow is only compared with the names in these folders, so it can never lead out of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import folder_paths

from ...unipic_core import MODELS
from ...unipic_core.errors import CheckpointError, UniPicError
from ...unipic_core.weights.files import find_weight_file
from ...unipic_core.weights.formats.safetensors_file import read_table
from ...unipic_core.weights.hub_cache import model_folder
from ...unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from ...unipic_core.weights.transformer import NETWORK_CLASS, class_name

AUTO = "auto"
DEFAULT_MODEL = "unipic-nano (bundled)"
GGUF = ".gguf"
FOLDER_KINDS = ("unipic", "diffusers")
"""Subfolders of ComfyUI's models folder, and keys of extra_model_paths.yaml, for whole released folders."""

_DEPTH = 2  # models/unipic/NAME and models/unipic/OWNER/NAME


@dataclass(frozen=True)
class FileKind:
    """A part of a model that may be a separate file: ComfyUI's folder for it, its usual name, where to get it."""

    label: str
    folder: str
    prefix: str
    get: str


TEXT_ENCODER = FileKind(
    "text encoder",
    "text_encoders",
    "qwen_2.5_vl_7b",
    "qwen_2.5_vl_7b.safetensors (16.6 GB) or qwen_2.5_vl_7b_fp8_scaled.safetensors (9.4 GB), from Qwen-Image's files "
    "for ComfyUI (huggingface.co/Comfy-Org/Qwen-Image_ComfyUI)",
)
VAE = FileKind(
    "VAE",
    "vae",
    "qwen_image_vae",
    "qwen_image_vae.safetensors (254 MB), from Qwen-Image's files for ComfyUI "
    "(huggingface.co/Comfy-Org/Qwen-Image_ComfyUI)",
)
_GET_MODEL = (
    "a released folder such as Skywork/Unipic3-DMD into models/unipic/, or a transformer file (41 GB in bf16, 20 GB "
    "in fp8) into models/diffusion_models/"
)


def register_folders() -> None:
    """Register models/unipic with ComfyUI; extra_model_paths.yaml may add folders under "unipic"."""
    folder_paths.add_model_folder_path("unipic", os.path.join(folder_paths.models_dir, "unipic"))


def models() -> dict[str, Path]:
    """All models by the name in the node's list: the bundled ones, folders, then single files."""
    register_folders()
    paths = {f"{path.name} (bundled)": path for path in _model_folders(MODELS)}
    for kind in FOLDER_KINDS:
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            for path in _model_folders(root):
                paths.setdefault(f"{kind}/{path.relative_to(root).as_posix()}", model_folder(path))
    return paths | _files("diffusion_models") | _gguf_files()


def find_model(name: str) -> Path:
    """Folder or file of a name in the list. UniPicError names similar models and the folder for new ones."""
    paths, given = models(), name
    name = name if isinstance(name, str) else str(name)  # a wire or the API lets anything through
    if name in paths and paths[name].suffix != GGUF:
        return paths[name]
    if name.endswith(GGUF):
        raise UniPicError(
            f"Load UniPic does not read GGUF, got {name}; use Unet Loader (GGUF) of ComfyUI-GGUF for the MODEL, with "
            "Load CLIP and Load VAE"
        )
    near = get_close_matches(name, paths, n=3, cutoff=0.5) or list(paths)[:3]
    raise UniPicError(
        f"there is no model {given!r}; choose one of {', '.join(near)}{', ...' if len(paths) > len(near) else ''}, or "
        f"put {_GET_MODEL} and press R to refresh the list"
    )


def choices(kind: FileKind) -> list[str]:
    """Options of the node's list for a part."""
    return [AUTO, *_bundled(kind), *_files(kind.folder)]


def find_part(kind: FileKind, name: str, model: Path) -> Path:
    """A file; for "auto" the model's folder if it holds this part, else the only file with the usual name.

    UniPicError names the missing file, its size and its folder.
    """
    if name == AUTO and has_part(model, kind):
        return model
    files = {**_bundled(kind), **_files(kind.folder)}
    if isinstance(name, str) and name in files:
        return files[name]
    if name != AUTO:
        raise UniPicError(
            f"there is no {kind.label} {name!r} in models/{kind.folder}/; put the file there, or choose auto"
        )
    usual = [file for file in files if Path(file).name.startswith(kind.prefix)]
    if len(usual) == 1:
        return files[usual[0]]
    if usual:
        raise UniPicError(
            f"auto found more than one {kind.label} in models/{kind.folder}/: {', '.join(usual)}; choose one in Load "
            "UniPic"
        )
    raise UniPicError(
        f"{model.name} comes without a {kind.label}, and models/{kind.folder}/ has none; put {kind.get}, into "
        f"models/{kind.folder}/, or choose another file in Load UniPic"
    )


def _bundled(kind: FileKind) -> dict[str, Path]:
    """Bundled models with this part: name in the node's list -> whole folder."""
    return {f"{path.name} (bundled)": path for path in _model_folders(MODELS) if has_part(path, kind)}


def checkpoint_prefix(names: Iterable[str], kind: FileKind) -> str:
    """Prefix of a part's names in a checkpoint with all parts, as Save Checkpoint writes it; "" in a file of one."""
    prefix = "vae." if kind is VAE else "text_encoders."
    names = list(names)
    whole = any(name.startswith("model.diffusion_model.") for name in names)
    return prefix if whole and any(name.startswith(prefix) for name in names) else ""


def has_part(model: Path, kind: FileKind) -> bool:
    """True if a pipeline folder, or a checkpoint with all parts, holds weights of this part."""
    if model.is_file():
        try:
            return bool(checkpoint_prefix(read_table(model)[0], kind))
        except CheckpointError:  # loading it says what is wrong
            return False
    folder = model / ("vae" if kind is VAE else "text_encoder")
    return folder.is_dir() and find_weight_file(folder) is not None


def _model_folders(root: Path) -> Iterator[Path]:
    """Folders under root that hold this network, at most `_DEPTH` deep, by name."""
    level = [root]
    for _ in range(_DEPTH):
        below = [p for folder in level for p in _subfolders(folder)]
        yield from (p for p in below if _holds_network(p))
        level = [p for p in below if not _holds_network(p)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:  # absent, or not readable
        return []


def _holds_network(folder: Path) -> bool:
    """True for a folder with a transformer/ or ema_transformer/ whose config, if any, does not name another network."""
    folder = model_folder(folder)
    parts = [folder / name for name in TRANSFORMER_FOLDERS if (folder / name).is_dir()]
    return any(class_name(part / "config.json") in (None, NETWORK_CLASS) for part in parts)


def _gguf_files() -> dict[str, Path]:
    """GGUF files, which ComfyUI's lists leave out: name below a folder for diffusion models -> file."""
    roots = [Path(root) for kind in ("diffusion_models", "unipic") for root in folder_paths.get_folder_paths(kind)]
    return {path.relative_to(root).as_posix(): path for root in roots for path in sorted(root.glob(f"**/*{GGUF}"))}


def _files(folder: str) -> dict[str, Path]:
    paths = {name: folder_paths.get_full_path(folder, name) for name in folder_paths.get_filename_list(folder)}
    return {name: Path(path) for name, path in paths.items() if path is not None}
