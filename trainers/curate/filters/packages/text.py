"""Text in pictures, such as watermarks and captions, found by rapidocr (PP-OCR, weights inside its wheel)."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from ..picture import Decoded

LONGEST = 960
LEAST_CONFIDENCE = 0.6
LEAST_LETTERS, TALLEST = 3, 1 / 3
"""Fewer letters, or a box of a larger share of the picture's height, is a shape that was read as a letter."""


def text(picture: Decoded) -> float:
    """Share of the picture's area in boxes of text."""
    image = picture.rgb
    if max(image.size) > LONGEST:
        scale = LONGEST / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    found = reader()(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
    if found.boxes is None:
        return 0.0
    area = 0.0
    for box, letters, share in zip(found.boxes, found.txts, found.scores, strict=True):
        corners = np.asarray(box)
        sure = share >= LEAST_CONFIDENCE and len(letters) >= LEAST_LETTERS
        if sure and np.ptp(corners[:, 1]) <= TALLEST * image.height:
            area += polygon_area(corners)
    return float(f"{area / (image.width * image.height):.6g}")


def polygon_area(corners: np.ndarray) -> float:
    """Area of a polygon from its corners [n, 2]."""
    x, y = corners[:, 0], corners[:, 1]
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


@lru_cache(maxsize=1)
def reader() -> Any:
    """Reader of one thread."""
    from rapidocr import RapidOCR

    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of every picture without text
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "EngineConfig.onnxruntime.inter_op_num_threads": 1}
    return RapidOCR(params={"Global.log_level": "error", **threads})
