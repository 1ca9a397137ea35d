"""Headers that a stranger made large are refused in one sentence, fast and in little memory."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import ROOT

OPEN = """
import re, sys, time
from pathlib import Path
from unipic_core.errors import CheckpointError
from unipic_core.weights.files import open_weights

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

before, start = memory("VmRSS"), time.process_time()
try:
    open_weights(Path(sys.argv[1]))
except CheckpointError as error:
    print(time.process_time() - start, memory("VmHWM") - before, error)
"""


def entry(shape: str = "[0]") -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'


def tensors(count: int) -> str:
    return "{" + ",".join(f'"{i}":{entry()}' for i in range(count)) + "}"


HEADERS: dict[str, tuple[Callable[[], str], str]] = {
    "a million tensors": (lambda: tensors(1_200_000), "has .* bytes, expected at most"),
    "a hundred thousand small ones": (lambda: tensors(120_000), "describes 120,000 tensors, expected at most 100,000"),
    "nested lists": (lambda: '{"a":' + "[" * 4_000_000 + "]" * 4_000_000 + "}", "is not JSON"),
    "many lists": (lambda: '{"a":[' + "[]," * 2_700_000 + "[]]}", "does not give type, shape and place of tensor 'a'"),
    "many dimensions": (
        lambda: '{{"a":{}}}'.format(entry("[" + "9223372036854775807," * 400_000 + "1]")),
        "place of tensor 'a'",
    ),
    "a long number": (lambda: '{"a":' + entry("[" + "9" * 8_000_000 + "]") + "}", "is not JSON"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", HEADERS)
def test_large_headers_are_refused_within_two_seconds_and_500_mb(kind: str, tmp_path: Path) -> None:
    make, message = HEADERS[kind]
    text, path = make().encode(), tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    seconds, mib, said = done.stdout.split(" ", 2)
    assert re.search(message, said), said
    assert said.count("\n") == 1
    assert float(seconds) < 2
    assert float(mib) < 500


def test_as_many_tensors_as_the_released_network_has_are_read(tmp_path: Path) -> None:
    from unipic_core.weights.files import open_weights

    text = json.dumps({f"b.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1_933)}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert len(open_weights(tmp_path / "a.safetensors")) == 1_933
