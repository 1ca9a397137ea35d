"""Where weights are found: the bundled models, released folders, and ComfyUI's own folders. Nothing is ever downloaded.

A name from a workflow is only compared with the names found here, so it can never lead out of these folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import folder_paths

from ...unipic_core import MODELS
from ...unipic_core.errors import UniPicError
from ...unipic_core.weights.files import find_weight_file
from ...unipic_core.weights.recipe import TRANSFORMER_FOLDERS
from ...unipic_core.weights.transformer import NETWORK_CLASS, class_name

AUTO = "auto"
DEFAULT_MODEL = "unipic-nano (bundled)"
FOLDER_KINDS = ("unipic", "diffusers")
"""Folders of ComfyUI's models folder, and keys of extra_model_paths.yaml, in which whole released folders lie."""

_DEPTH = 2  # models/unipic/NAME and models/unipic/OWNER/NAME


@dataclass(frozen=True)
class FileKind:
    """A part that may be a file of its own: ComfyUI's folder for it, the usual names, where to get it."""

    what: str
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
    "a whole folder such as Skywork/Unipic3-DMD into models/unipic/, or a transformer file (41 GB in bf16, 20 GB in "
    "fp8) into models/diffusion_models/"
)


def register_folders() -> None:
    """Makes models/unipic known to ComfyUI; extra_model_paths.yaml may name more places under "unipic"."""
    folder_paths.add_model_folder_path("unipic", os.path.join(folder_paths.models_dir, "unipic"))


def models() -> dict[str, Path]:
    """Every model by the name that the node shows: the bundled ones, folders, then single files."""
    register_folders()
    found = {f"{path.name} (bundled)": path for path in _model_folders(MODELS)}
    for kind in FOLDER_KINDS:
        for root in map(Path, folder_paths.get_folder_paths(kind)):
            for path in _model_folders(root):
                found.setdefault(f"{kind}/{path.relative_to(root).as_posix()}", path)
    return found | _files("diffusion_models")


def find_model(name: str) -> Path:
    """The folder or file of a name, or UniPicError that says what there is and where models go."""
    found = models()
    if name in found:
        return found[name]
    near = get_close_matches(name, found, n=3, cutoff=0.5) or list(found)[:3]
    raise UniPicError(
        f"there is no model {name!r} here; there are {', '.join(near)}{', ...' if len(found) > len(near) else ''}. "
        f"To use it, put {_GET_MODEL}; then refresh the page"
    )


def choices(kind: FileKind) -> list[str]:
    """What the node offers for a part."""
    return [AUTO, *_files(kind.folder)]


def find_part(kind: FileKind, name: str, model: Path) -> Path:
    """A file, or with "auto" the model's own folder if it holds this part, else the one file that is obvious.

    UniPicError says what is missing, where it goes and how large it is.
    """
    if name == AUTO and own_part(model, kind):
        return model
    files = _files(kind.folder)
    if name in files:
        return files[name]
    if name != AUTO:
        raise UniPicError(f"there is no {kind.what} {name!r} in models/{kind.folder}/; put it there, or choose auto")
    obvious = [file for file in files if Path(file).name.startswith(kind.prefix)]
    if len(obvious) == 1:
        return files[obvious[0]]
    if obvious:
        raise UniPicError(f"models/{kind.folder}/ holds {', '.join(obvious)}; choose the {kind.what} in the node")
    raise UniPicError(
        f"{model.name} needs a {kind.what} and none is here: put {kind.get}, into models/{kind.folder}/, "
        "or choose another file in the node"
    )


def own_part(model: Path, kind: FileKind) -> bool:
    """Whether a pipeline folder brings this part itself."""
    folder = model / ("vae" if kind is VAE else "text_encoder")
    return folder.is_dir() and find_weight_file(folder) is not None


def _model_folders(root: Path) -> Iterator[Path]:
    """Folders under root that hold this network, at most `_DEPTH` deep, in the order of their names."""
    level = [root]
    for _ in range(_DEPTH):
        below = [p for folder in level for p in _subfolders(folder)]
        yield from (p for p in below if _holds_network(p))
        level = [p for p in below if not _holds_network(p)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:  # not there, or not ours to read
        return []


def _holds_network(folder: Path) -> bool:
    """Whether there is a transformer/ or ema_transformer/, and its config, if any, does not name another network."""
    parts = [folder / name for name in TRANSFORMER_FOLDERS if (folder / name).is_dir()]
    return any(class_name(part / "config.json") in (None, NETWORK_CLASS) for part in parts)


def _files(folder: str) -> dict[str, Path]:
    found = {name: folder_paths.get_full_path(folder, name) for name in folder_paths.get_filename_list(folder)}
    return {name: Path(path) for name, path in found.items() if path is not None}
