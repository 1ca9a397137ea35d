"""Export as WebDataset tars (KEY.image_1.png, ..., KEY.target.png, KEY.json) with one parquet table of metadata."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from unipic_core.replacing import replacing

from ..errors import CurateError
from ..manifest.shards import Row, batches, full_disk, make_folder
from .rows import ending_of


def write_webdataset(rows: Iterable[Row], out: Path, folder: Path, rows_per_tar: int) -> Path:
    """Write 00000.tar, ... and metadata.parquet. Raises CurateError on a full disk, or without pyarrow."""
    pyarrow, parquet = arrow()
    make_folder(folder)
    table_path = folder / "metadata.parquet"
    schema = pyarrow.schema(
        [("key", "string"), ("tar", "string"), ("instruction", "string"), ("images", "int32"),
         ("composition", "string"), ("attempt", "int32"), ("target_id", "string"),
         ("source_ids", pyarrow.list_(pyarrow.string())),
         ("width", "int32"), ("height", "int32"), ("scores", "string")]
    )  # fmt: skip
    count = 0
    try:
        with replacing(table_path) as partial, parquet.ParquetWriter(partial, schema) as writer:
            for count, some in enumerate(batches(rows, rows_per_tar), 1):
                tar = folder / f"{count - 1:05d}.tar"
                write_tar(tar, some, out)
                writer.write_table(pyarrow.Table.from_pylist([metadata(row, tar.name) for row in some], schema))
        for tar in sorted(folder.glob("[0-9]*.tar")):
            if int(tar.stem) >= count:  # of an earlier export with more rows
                tar.unlink()
    except OSError as error:
        raise full_disk(table_path, error) from None
    return table_path


def arrow() -> tuple[ModuleType, ModuleType]:
    """Import pyarrow and pyarrow.parquet. Raises CurateError if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CurateError('export.kind webdataset needs pyarrow; run pip install "comfyui-unipic[parquet]"') from None
    return pyarrow, pyarrow.parquet


def key_of(row: Row) -> str:
    """Key of a row's files in a tar."""
    return f"{row['row']:08d}"


def metadata(row: Row, tar: str) -> Row:
    """Row of the table."""
    scores = {name: verdict["score"] for name, verdict in row.get("filters", {}).items()}
    return {
        "key": key_of(row), "tar": tar, "instruction": row["instruction"], "images": len(row["sources"]),
        "composition": row["composition"], "attempt": row["attempt"], "target_id": row["id"],
        "source_ids": [source["id"] for source in row["sources"]], "width": row["width"], "height": row["height"],
        "scores": json.dumps(scores),
    }  # fmt: skip


def write_tar(path: Path, rows: Iterable[Row], out: Path) -> None:
    """Write one tar; equal rows give equal bytes."""
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            for name, data in members(row, out):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def members(row: Row, out: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a row's files."""
    key = key_of(row)
    for number, source in enumerate(row["sources"], 1):
        path = out / source["path"]
        yield f"{key}.image_{number}{ending_of(path)}", path.read_bytes()
    target = out / row["path"]
    yield f"{key}.target{ending_of(target)}", target.read_bytes()
    about = {"instruction": row["instruction"], "composition": row["composition"], "attempt": row["attempt"]}
    yield f"{key}.json", json.dumps(about, ensure_ascii=False).encode()
