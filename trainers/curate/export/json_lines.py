"""Export as JSON lines: this project's rows (input_images, instruction, output_image), and MICo-150K's fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from unipic_core.replacing import replacing

from ..manifest.shards import ESCAPED, Row, full_disk, make_folder
from .rows import put_picture


def write_jsonl(rows: Iterable[Row], out: Path, folder: Path) -> Path:
    """Write data.jsonl, for `data: {kind: jsonl, path: ...}` of a training config."""
    return _write(rows, out, folder, training_row)


def write_mico(rows: Iterable[Row], out: Path, folder: Path) -> Path:
    """Write data.jsonl in MICo-150K's fields: `reference` is De&Re's photograph, of other rows the target."""
    return _write(rows, out, folder, mico_row)


def training_row(row: Row, sources: list[str], target: str, reference: str) -> Row:
    """Row of this project's training data; it has no place for the reference."""
    about = {"id": row["id"], "composition": row["composition"], "attempt": row["attempt"]}
    return {"input_images": sources, "instruction": row["instruction"], "output_image": target, **about}


def mico_row(row: Row, sources: list[str], target: str, reference: str) -> Row:
    """Row in MICo-150K's fields: idx (De&Re: ed_idx), input, reference, Task, prompt, refined_prompt, human_indices."""
    number = {"ed_idx" if "reference" in row else "idx": row["row"]}
    humans = [i for i, source in enumerate(row["sources"]) if source["subject"] == "person"]
    task = "De&Re" if "reference" in row else "human_centric" if humans else "object_centric"
    plain = row.get("plain_instruction", row["instruction"])
    return {
        **number, "input": sources, "reference": reference, "output": target, "Task": task,
        "editing_type": "decompose_recompose" if "reference" in row else "composition", "prompt": plain,
        "refined_prompt": row["instruction"], "human_indices": humans,
    }  # fmt: skip


def _write(rows: Iterable[Row], out: Path, folder: Path, row_of: Callable[[Row, list[str], str, str], Row]) -> Path:
    """Write one line per row, its pictures below `folder`. Raises CurateError on a full disk."""
    make_folder(folder)
    path = folder / "data.jsonl"
    try:
        with replacing(path) as partial, partial.open("w", encoding="utf-8", errors=ESCAPED) as file:
            for row in rows:
                sources = [put_picture(out / one["path"], folder, one["id"]) for one in row["sources"]]
                target = put_picture(out / row["path"], folder, row["id"])
                reference = (
                    put_picture(out / row["reference"], folder, f"{row['composition']}-reference")
                    if "reference" in row
                    else target
                )
                file.write(json.dumps(row_of(row, sources, target, reference), ensure_ascii=False) + "\n")
    except OSError as error:
        raise full_disk(path, error) from None
    return path
