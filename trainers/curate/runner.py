"""A run: all stages of STAGES.yaml in order, each shard once; the manifest, summary and sheets of every stage."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from unipic_core.replacing import write_json

from .config import Stages
from .errors import CurateError
from .export.json_lines import write_jsonl, write_mico
from .export.rows import finished, left_out
from .export.webdataset import arrow, write_webdataset
from .filters.catalogue import chosen
from .manifest.executor import open_executor
from .manifest.scores import Scores
from .manifest.shards import StageFolder, full_disk, make_folder
from .manifest.summary import StageSummary
from .stages.decompose import decompose
from .stages.filter import filter_pictures
from .stages.ingest import ingest
from .stages.pair import pair, rules_of
from .stages.prompt import prompt
from .stages.questions import open_judge
from .stages.sheets import sheets_of
from .stages.synthesise import synthesise
from .stages.tools import Tools
from .synthesis.endpoint import ImagesClient


def run(stages: Stages, executor: str = "local") -> list[StageSummary]:
    """Run or continue. Raises CurateError, or JudgeError if the server is lost; the next run goes on from there."""
    check_settings(stages)
    make_folder(stages.folder)
    workers = open_executor(executor, stages.workers)
    with closing(workers), closing(Scores(stages.folder / "scores.sqlite")) as scores:
        tools = Tools(scores, workers, open_judge(stages.judge))
        return _stages(stages, tools)


def check_settings(stages: Stages) -> None:
    """Find faults of the config before any work. Raises CurateError."""
    chosen(stages.filter.filters, "filter")
    chosen(stages.check.filters, "check")
    if stages.pair is not None:
        rules = rules_of(stages.pair)
        for name in stages.pair.always:
            if name not in rules.categories:
                raise CurateError(f"pair.always: there is no category {name!r}; known: {', '.join(rules.categories)}")
    if any(one.kind == "webdataset" for one in stages.export):
        arrow()
    for section, maker in (("decompose", stages.decompose), ("synthesise", stages.synthesise)):
        if maker is not None and maker.kind == "endpoint":
            assert stages.images is not None  # checked by the config
            ImagesClient(stages.images)
        if maker is not None and maker.model is not None and not Path(maker.model).is_dir():
            raise CurateError(f"{section}.model: expected a folder of weights, got {maker.model}, which is none")


def _stages(stages: Stages, tools: Tools) -> list[StageSummary]:
    summaries = []

    def finish(folder: StageFolder) -> StageFolder:
        """Summary and sheets of a finished stage."""
        summary = StageSummary.of(folder.name, folder.rows())
        summaries.append(summary)
        print(summary.text(), flush=True)
        sheets_of(folder.rows(), folder.path, stages.folder)
        return folder

    sources = finish(ingest(stages, tools.executor))
    kept = finish(filter_pictures(stages, sources, tools))
    if stages.synthesise is not None:
        rules = rules_of(stages.pair) if stages.pair else None
        if stages.pair:
            composed = pair(stages, stages.pair, kept)
        else:
            assert stages.decompose is not None  # checked by the config
            composed = decompose(stages, stages.decompose, kept, tools)
        rows = finish(prompt(stages, finish(composed), rules, tools))
        checks: list[StageFolder] = []
        for attempt in range(1, stages.synthesise.attempts + 1):
            made = synthesise(stages, stages.synthesise, checks[-1] if checks else rows, tools, attempt)
            if attempt > 1 and not any(True for _ in made.rows()):
                break
            finish(made)
            checks.append(finish(filter_pictures(stages, made, tools, f"check-{attempt}")))
        export(stages, checks)
    write_summary(stages.folder, summaries)
    return summaries


def export(stages: Stages, checks: list[StageFolder]) -> None:
    """Write all exports and print where they are, and the rows that are left out."""
    count = sum(1 for _ in finished(checks))
    missing = left_out(checks)
    said = ", ".join(f"{number:,} {kind}" for kind, number in missing.items() if number)
    print(f"export: {count:,} rows" + (f"; left out: {said}" if said else ""))
    if not count:
        raise CurateError(
            f"no row passed every check ({said or 'there are no rows'}); see the sheets and reasons in {stages.folder}"
        )
    for one in stages.export:
        folder = stages.folder / "export" / one.kind
        if one.kind == "webdataset":
            path = write_webdataset(finished(checks), stages.folder, folder, one.rows_per_tar)
        else:
            path = (write_jsonl if one.kind == "jsonl" else write_mico)(finished(checks), stages.folder, folder)
        print(f"  {one.kind}: {path}")


def write_summary(folder: Path, summaries: Iterable[StageSummary]) -> None:
    """Write summary.json."""
    path = folder / "summary.json"
    try:
        write_json(path, [one.as_row() for one in summaries])
    except OSError as error:
        raise full_disk(path, error) from None
