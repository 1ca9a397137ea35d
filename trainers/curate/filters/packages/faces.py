"""Faces by dlib with the weights of face_recognition_models (CC0): for photographs, not for drawings."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unipic_core.errors import UniPicError

from ...manifest.scores import FINAL, NOT_RUN
from ...manifest.shards import Row
from ..picture import Decoded, decode, read_bytes
from . import folder_of

LONGEST = 640
"""Pixels of the longer side at which faces are searched."""

HAIR = 0.5
"""A head reaches this share of the face's height above it."""

LEAST_HEIGHT = 0.05
"""Share of the picture's height below which a face is too small to judge."""

LEAST_SCORE = 0.3
"""Of the gradient detector; badges and patterns come out at 0.1, faces at 1."""


def head(picture: Decoded) -> float:
    """Share of the largest head inside the frame, of its box with hair and of five landmarks; 0 without a face."""
    image = small(picture)
    face = largest_face(image)
    if face is None or face.height() < LEAST_HEIGHT * image.shape[0]:
        return 0.0
    height, width = image.shape[:2]
    top = face.top() - HAIR * face.height()
    across = min(width, face.right()) - max(0, face.left())
    down = min(height, face.bottom()) - max(0.0, top)
    share = across * down / ((face.right() - face.left()) * (face.bottom() - top))
    points = landmarks()(image, face).parts()
    seen = sum(0 <= point.x < width and 0 <= point.y < height for point in points) / len(points)
    return float(f"{max(share, 0.0) * seen:.6g}")


def face_identity(out: Path, row: Row) -> Any:
    """Largest distance of a source person's face to the nearest face of the target; 0.6 and less: the same person."""
    persons = [source for source in row["sources"] if source["subject"] == "person"]
    if not persons:
        return {NOT_RUN: "the row has no person", FINAL: True}
    shown = embeddings(_read(out / row["path"]))
    if not len(shown):
        return {NOT_RUN: "no face was found in the target", FINAL: True}
    distances = []
    for source in persons:
        known = embeddings(_read(out / source["path"]))
        if not len(known):
            return {NOT_RUN: f"no face was found in {source['path']}", FINAL: True}
        distances.append(float(np.linalg.norm(shown - known[0], axis=1).min()))
    return float(f"{max(distances):.6g}")


def embeddings(picture: Decoded) -> np.ndarray:
    """128 numbers per face [n, 128], the largest face first."""
    image = small(picture)
    found = [np.array(network().compute_face_descriptor(image, landmarks()(image, face))) for face in faces(image)]
    return np.array(found).reshape(-1, 128)


def largest_face(image: np.ndarray) -> Any:
    """Box of the largest face of uint8 [H, W, 3]; None without any."""
    return next(iter(faces(image)), None)


def faces(image: np.ndarray) -> list[Any]:
    """Boxes, the largest first: by gradients, and where these see none by a slower network."""
    boxes, scores, _ = gradients().run(image, 1, 0.0)
    found = [box for box, score in zip(boxes, scores, strict=True) if score >= LEAST_SCORE]
    if not found:
        found = [one.rect for one in detector()(image, 0)]
    return sorted(found, key=lambda face: -face.area())


def small(picture: Decoded) -> np.ndarray:
    """uint8 [H, W, 3], the longer side at most LONGEST."""
    image = picture.rgb.copy()
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image))


def _read(path: Path) -> Decoded:
    return decode(read_bytes(str(path)), str(path))


def _weights(name: str) -> str:
    path = folder_of("face_recognition_models") / "models" / name
    if not path.is_file():
        raise UniPicError(f"{path} does not exist; install face_recognition_models 0.3.0 again")
    return str(path)


@lru_cache(maxsize=1)
def gradients() -> Any:
    """Fast detector of frontal faces, by histograms of gradients."""
    import dlib

    return dlib.get_frontal_face_detector()


@lru_cache(maxsize=1)
def detector() -> Any:
    """Slow detector, a network that sees faces from the side too."""
    import dlib

    return dlib.cnn_face_detection_model_v1(_weights("mmod_human_face_detector.dat"))


@lru_cache(maxsize=1)
def landmarks() -> Any:
    """Predictor of five landmarks of a face."""
    import dlib

    return dlib.shape_predictor(_weights("shape_predictor_5_face_landmarks.dat"))


@lru_cache(maxsize=1)
def network() -> Any:
    """Network of a face to 128 numbers."""
    import dlib

    return dlib.face_recognition_model_v1(_weights("dlib_face_recognition_resnet_model_v1.dat"))
