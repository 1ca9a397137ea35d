"""Hugging Face data sets on disk."""

from __future__ import annotations

from typing import Any

from ...config.run import ConfigError, DataConfig
from ..rows import Record
from .base import PictureRows, record_of


class SavedDataset(PictureRows):
    """Hugging Face data set from `save_to_disk` with the columns input_images, instruction and output_image.

    A column mask is optional. Pictures are Image features, bytes, or paths below data.images. In a data set with
    splits, `train` is used.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        try:
            from datasets import load_from_disk
        except ImportError:
            raise ConfigError("data.kind datasets needs the package datasets; run pip install datasets") from None
        try:
            loaded: Any = load_from_disk(str(self.path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} is not a saved data set: {' '.join(str(error).split())[:200]}") from None
        if isinstance(loaded, dict):
            if "train" not in loaded:
                raise ConfigError(
                    f"{self.path} has the splits {', '.join(loaded)} and no train; set data.path to the folder of one"
                )
            loaded = loaded["train"]
        missing_columns = {"input_images", "instruction", "output_image"} - set(loaded.column_names)
        if missing_columns:
            raise ConfigError(
                f"{self.path} has no column {', '.join(sorted(missing_columns))}; its columns are {loaded.column_names}"
            )
        self.table = loaded.with_format("arrow")  # pictures as they are stored, not decoded
        self.count = len(loaded)

    def read(self, i: int) -> Record:
        (values,) = self.table[i].to_pylist()
        return record_of(values, self.root)
