"""Files that a stranger made large, deep or endless: one sentence within 2 s and 500 MB."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.paths import ROOT, TINY

MEASURE = """
import re, sys, time
from pathlib import Path
from unipic_core.errors import UniPicError
from unipic_core.weights.files import open_weights
from unipic_core.weights.lora import read_lora
from unipic_core.weights.text_encoder import open_encoder
from unipic_core.weights.transformer import open_transformer, read_shift
from unipic_core.weights.vae import load_image_vae

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

USES = {
    "weights": open_weights, "network": open_transformer, "lora": read_lora, "encoder": open_encoder,
    "vae": lambda folder: load_image_vae(folder / "vae"), "scheduler": read_shift,
}
for line in sys.stdin:
    use, kind, path = line.rstrip().split("|")
    open("/proc/self/clear_refs", "w").write("5")
    before, start, said = memory("VmRSS"), time.process_time(), "nothing"
    try:
        USES[use](Path(path))
    except UniPicError as error:
        said = str(error)
    print(kind, time.process_time() - start, memory("VmHWM") - before, repr(said), sep="|")
"""


def zipped(path: Path, data: bytes, records: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> Path:
    """A file as `torch.save` lays it out, with a pickle of one's choice."""
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("m/data.pkl", data)
        for name, content in (records or {}).items():
            archive.writestr(f"m/data/{name}", content)
    return path


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def deflated(source: Path) -> Path:
    """The same archive, compressed."""
    target = source.with_name("deflated.bin")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return target


def many_files(path: Path, count: int) -> Path:
    """A zip whose directory lists one record over and over."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entry) * count, len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(entry) * count, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(local + entry * count + wide + locator + end)
    return path


def tuple_keys(depth: int) -> bytes:
    """A table whose key is a tuple of a tuple of ... twice each: its hash takes 2 ** depth steps."""
    body = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0"
    for _ in range(depth):
        body += pickle.BINGET + b"\0" + pickle.TUPLE2 + pickle.BINPUT + b"\0"
    return body + pickle.NONE + pickle.SETITEM + pickle.STOP


def large(path: Path, size: int = 200_000_000) -> Path:
    """A file of so many bytes that takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def model(folder: Path, part: str, **changes: Any) -> Path:
    """The small model with another config of one part."""
    folder = shutil.copytree(TINY, folder)
    config = folder / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return folder


def with_large(folder: Path, name: str) -> Path:
    folder = shutil.copytree(TINY, folder)
    large(folder / name)
    return folder


def index(folder: Path, weight_map: dict[str, str]) -> Path:
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    save_file({"img_in.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.safetensors")
    large(folder / "adapter_config.json")
    return folder


def aliases(path: Path) -> Path:
    base = torch.zeros(1 << 18)
    return saved(path, OrderedDict((f"{i}.lora_A.weight", base[: 1 << 18]) for i in range(3_000)))


FEW, MANY, PLAIN = "list of tensors has", "is not trustworthy and was not read", "not a pickle of plain tensors"
KINDS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "expanded": ("weights", lambda d: saved(d / "a.bin", {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}), MANY),
    "one storage 3,000 times": ("lora", lambda d: aliases(d / "a.bin"), MANY),
    "deflated pickle": ("weights", lambda d: zipped(d / "a.bin", bytes(1 << 28), how=8), "data.pkl compressed"),
    "deflated tensors": ("weights", lambda d: deflated(saved(d / "a.bin", {"a": torch.zeros(9)})), "compressed"),
    "a million files": ("weights", lambda d: many_files(d / "a.bin", 1_200_000), MANY),
    "long pickle": ("weights", lambda d: zipped(d / "a.bin", pickle.NONE * (1 << 23)), FEW),
    "many instructions": ("weights", lambda d: zipped(d / "a.bin", b"\x80\2" + pickle.NONE * 4_000_000), FEW),
    "long frame": (
        "weights",
        lambda d: zipped(d / "a.bin", b"\x80\4\x95" + b"\xff" * 8 + pickle.NONE * 4_000_000),
        FEW,
    ),
    "long byte array": (
        "weights",
        lambda d: zipped(d / "a.bin", b"\x80\5\x96" + b"\xff" * 5 + bytes(3)),
        "not a pickle",
    ),
    "far memo": ("weights", lambda d: zipped(d / "a.bin", b"\x80\2Nr" + b"\xff" * 4 + b"."), "no table of tensors"),
    "keys of tuples": ("weights", lambda d: zipped(d / "a.bin", tuple_keys(200)), PLAIN),
    "old form": ("weights", lambda d: large(d / "a.bin"), "not a pickle|not a readable"),
    "config": ("network", lambda d: with_large(d / "m", "transformer/config.json"), "expected at most 1,048,576"),
    "vae config": ("vae", lambda d: with_large(d / "m", "vae/config.json"), "expected at most 1,048,576"),
    "scheduler": ("scheduler", lambda d: with_large(d / "m", "scheduler/scheduler_config.json"), "expected at most"),
    "encoder config": ("encoder", lambda d: with_large(d / "m", "text_encoder/config.json"), "expected at most"),
    "recipe": ("network", lambda d: with_large(d / "m", "recipe.json"), "expected at most 1,048,576"),
    "adapter settings": ("lora", lambda d: adapter(d / "m"), "adapter settings"),
    "index": ("weights", lambda d: large(d / "a.safetensors.index.json"), "expected at most 8,388,608"),
    "index of many": ("weights", lambda d: index(d / "m", {str(i): "1.safetensors" for i in range(200_000)}), MANY),
    "index of files": ("weights", lambda d: index(d / "m", {str(i): f"{i}.safetensors" for i in range(2_000)}), MANY),
    "layers": ("network", lambda d: model(d / "m", "transformer", num_layers=400), "does not fit the network"),
    "layers beyond all": ("network", lambda d: model(d / "m", "transformer", num_layers=10**9), "from 1 to 400"),
    "heads": (
        "network",
        lambda d: model(d / "m", "transformer", num_attention_heads=1 << 20),
        "width should be at most",
    ),
    "vae blocks": ("vae", lambda d: model(d / "m", "vae", num_res_blocks=100), "does not fit its config"),
    "encoder depth": (
        "encoder",
        lambda d: model(d / "m", "text_encoder", vision_config={"depth": 900}),
        "depth is 900",
    ),
    "encoder width": (
        "encoder",
        lambda d: model(d / "m", "text_encoder", hidden_size=1 << 40),
        "hidden_size should be",
    ),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_each_is_refused_in_one_sentence_within_two_seconds_and_500_mb(tmp_path: Path) -> None:
    lines = []
    for i, (kind, (use, make, _)) in enumerate(KINDS.items()):
        (tmp_path / str(i)).mkdir()
        lines.append(f"{use}|{kind}|{make(tmp_path / str(i))}\n")
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, input="".join(lines), capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split("|", 3) for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in told] == list(KINDS)
    for kind, seconds, mib, said in told:
        assert re.search(KINDS[kind][2], said), (kind, said)
        assert "\\n" not in said, (kind, said)
        assert float(seconds) < 2, (kind, seconds)
        assert float(mib) < 500, (kind, mib)
