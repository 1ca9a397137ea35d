"""Filter: measure what is not stored, ask the judge about what is left, then decide every row by the thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...digests import digest
from ...progress import Progress
from ..config import FilterConfig, Stages
from ..filters.calibration import Calibration
from ..filters.catalogue import FILTERS, Filter, chosen
from ..filters.decide import Decisions, values_of
from ..filters.measure import measure_pictures
from ..manifest.scores import NOT_RUN
from ..manifest.shards import Row, StageFolder
from .likeness import measure_likeness
from .questions import ask_about_pictures
from .tools import Tools

VERSION = 1


def filter_pictures(stages: Stages, before: StageFolder, tools: Tools, name: str = "filter") -> StageFolder:
    """Write the manifest with verdicts. name: "filter" for sources, "check-1", ... for targets."""
    stage = "filter" if name == "filter" else "check"
    configs: dict[str, FilterConfig] = getattr(stages, stage).filters
    filters = chosen(configs, stage)
    progress = Progress(name, sum(1 for _ in before.rows()))
    measure_pictures(before.rows(), filters, tools.scores, tools.executor, stages.folder, progress)
    progress.close()
    measure_likeness(before, filters, tools, stages.folder, name)
    calibration = _calibration(before, filters, tools)
    local = [one for one in filters if one.rank != "endpoint"]

    def survivors() -> Iterator[Row]:
        for rows in decided(before, Decisions(local, calibration), tools):
            yield from rows

    ask_about_pictures(survivors, filters, tools.scores, tools.judge, stages.folder, name)
    settings = {one.name: [tools.judge_key(one), one.least, one.most, one.subjects] for one in filters}
    folder = StageFolder(stages.folder, name, digest("filter", VERSION, settings, before.content), before.count)
    for index, rows in enumerate(decided(before, Decisions(filters, calibration), tools)):
        folder.write(index, rows)
    return folder


def decided(before: StageFolder, decisions: Decisions, tools: Tools) -> Iterator[list[Row]]:
    """Rows with verdicts, shard by shard."""
    for index in range(before.count):
        rows = before.read(index)
        values = values_of(tools.scores, decisions.filters, rows, tools.judge_key)
        yield [decisions.decide(row, values) for row in rows]


def _calibration(before: StageFolder, filters: Sequence[Filter], tools: Tools) -> Calibration | None:
    """Percentiles of this corpus, if a filter needs them."""
    if not any(one.name == "clutter" for one in filters):
        return None

    def values() -> Iterator[tuple[str, dict[str, float]]]:
        for index in range(before.count):
            ids = [row["id"] for row in before.read(index) if row["keep"] is True]
            known = tools.scores.known(FILTERS["clutter"].key, ids)
            yield from ((key, one) for key, one in known.items() if NOT_RUN not in one and one["bits"])

    return Calibration(values())
