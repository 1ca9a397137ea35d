"""docs/training.md: its example configs are valid, and name what their text says."""

from __future__ import annotations

import re

import yaml

from tests.paths import ROOT
from trainers.config.parse import parse
from trainers.config.run import DataConfig, parse_run

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
EXAMPLES = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]


def test_examples_parse() -> None:
    sources, run = EXAMPLES
    data = parse(DataConfig, sources["data"], "config.data")
    assert [source.repeats for source in data.sources] == [1, 2]
    config = parse_run(run)
    assert (config.method, config.validation.share, config.network.block_swap) == ("consistency", 0.02, 20)


def test_every_kind_of_data_is_in_the_table() -> None:
    kinds = re.findall(r"^\| `(\w+)` \| ", PAGE.split("## Data")[1].split("## Cache")[0], re.MULTILINE)
    assert kinds.pop(0) == "kind"  # the head of the table
    for kind in kinds:
        path = None if kind in ("nano", "scenes") else "data"
        folder = "" if kind == "scenes" else "cache"
        samples = 0 if kind == "scenes" else 1024
        assert DataConfig(folder=folder, kind=kind, path=path, samples=samples).kind == kind
    assert len(kinds) == 7
