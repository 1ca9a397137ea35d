"""HTML page of a run's cases: self-contained, answers escaped, thumbnails of at most 50 MB in total."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from .cases import Case, Plan
from .make import result_path
from .pictures import thumbnail
from .pixels import PIXELS
from .score import Rows

LARGEST = 50_000_000
"""Characters of embedded thumbnails on a page, base64."""

STYLE = """body{font:14px sans-serif;margin:20px;color:#222}table{border-collapse:collapse;margin:12px 0}
td,th{border-bottom:1px solid #ddd;padding:5px 9px;text-align:left;vertical-align:top}img{max-width:128px;margin:2px}
pre{white-space:pre-wrap;font-size:11px;max-width:240px;max-height:90px;overflow:auto;color:#555}.bad{color:#a00}
small{color:#666}.words{max-width:220px}td>div:first-of-type{margin-top:6px}"""
SCRIPT = """const t=document.getElementById('t'),f=document.getElementById('f');function go(){
for(const r of document.querySelectorAll('tr.case'))
r.hidden=(t.value&&r.dataset.task!=t.value)||(f.checked&&!r.dataset.bad)}
t.onchange=f.onchange=go"""
esc = html.escape


def page(plan: Plan, rows: Rows, summary: dict[str, Any], out: Path) -> str:
    """Render the page of a run. rows: scores; summary: report.json; out: the run's folder."""
    about = {name: summary[name] for name in ("version", "commit", "date", "seed", "systems", "judges", "not_covered")}
    tasks = sorted({case.task for case in plan.cases})
    options = "".join(f'<option value="{esc(task, quote=True)}">{esc(task)}' for task in tasks)
    labels = "".join(f"<th>{esc(label)}" for label in plan.systems)
    spent = [0]
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{esc(plan.bench)}</title><style>{STYLE}</style>",
        f"<h1>{esc(plan.bench)}: {len(plan.cases)} cases, {len(plan.systems)} systems</h1>",
        header(summary),
        f"<details><summary>all settings</summary><pre style='max-width:none;max-height:none'>"
        f"{esc(json.dumps(about, indent=1))}</pre></details>",
        *(controls_table(judge, summary["controls"].get(judge)) for judge in summary["judges"]),
        f"<table><tr><th>score{labels}</tr>",
        *(score_row(judge, scores, judge in summary["lower_is_better"]) for judge, scores in summary["scores"].items()),
        *(
            f"<tr><td>{esc(judge)}<td colspan={len(plan.systems)} class=bad>{esc(note)}</tr>"
            for judge, note in summary["not_reported"].items()
        ),
        "</table><small>value [95% over cases]; below it the paired difference from the first system, its interval, "
        "and ",
        "the number of judged cases</small>",
        *(group_table(judge, scores) for judge, scores in summary["scores"].items() if not judge.startswith(PIXELS)),
        *(parts_table(judge, scores) for judge, scores in summary["scores"].items()),
        f"<p>task <select id=t><option value=''>all{options}</select> <label><input type=checkbox id=f> failures only",
        f"</label></p><table><tr><th>case<th>sources<th>truth{labels}</tr>",
        *(case_row(plan, rows, list(summary["scores"]), case, out, spent) for case in plan.cases),
        f"</table><script>{SCRIPT}</script>",
    ]
    return "".join(parts)


def header(summary: dict[str, Any]) -> str:
    """Render the systems, the judges and the version in words."""
    lines = [f"<b>{esc(label)}</b>: {esc(system_words(about))}" for label, about in summary["systems"].items()]
    lines += [f"<b>{esc(name)}</b>: {esc(judge_words(about))}" for name, about in summary["judges"].items()]
    commit = f", commit {summary['commit'][:12]}" if summary["commit"] else ""
    lines.append(f"version {esc(summary['version'])}{esc(commit)}, {esc(summary['date'])}, seed {summary['seed']}")
    if summary["not_covered"]:
        lines.append(f"{len(summary['not_covered'])} cases of more than six sources are not covered")
    return f"<p>{'<br>'.join(lines)}</p>"


def system_words(about: dict[str, Any]) -> str:
    """Model, LoRA and the recipe that it ran with; or the folder of another program's pictures."""
    if "model" not in about:
        return f"pictures of {about.get('pictures', 'another program')}"
    lora = [f"LoRA {Path(about['lora']).name}"] if about.get("lora") else []
    budget = [f"reference budget {about['budget']}"] if about.get("budget") else []
    guidance = f"guidance {about['cfg']:g}" if about["cfg"] is not None else "no guidance"
    steps = f"{about['steps']} step{'s' * (about['steps'] != 1)}"
    return ", ".join([Path(about["model"]).name, *lora, steps, guidance, f"sampler {about['sampler']}", *budget])


def judge_words(about: dict[str, Any]) -> str:
    """Sampling of a judge, and how its answers are read."""
    config, abilities = about["settings"], about["abilities"]
    passes = f"{config['passes']} pass{'es' * (config['passes'] != 1)}"
    read = "log-probabilities where a question asks for one word" if abilities["logprobs"] else "text"
    sampling = f"temperature {config['temperature']:g}, {passes}, seed {config['seed']}"
    return f"{config['model']}, {sampling}, answers read from {read}, response format {abilities['response_format']}"


def controls_table(judge: str, fitness: dict[str, Any] | None) -> str:
    """Render a judge's test on controls."""
    if not fitness:
        return f"<p>{esc(judge)} was not tested on controls.</p>"
    names = "".join(f"<th>{esc(name)}" for name in fitness["means"])
    means = "".join(f"<td>{number(one['mean'])} {bounds(one['ci95'])}" for one in fitness["means"].values())
    return f"<p>{esc(judge)}: <b>{esc(fitness['sentence'])}</b></p><table><tr>{names}</tr><tr>{means}</tr></table>"


def score_row(judge: str, scores: dict[str, Any], lower_is_better: bool) -> str:
    """Render one judge, or one pixel measure: a cell per system."""
    name = (next(iter(scores.values()))["name"] if scores else "") + ", lower is better" * lower_is_better
    cells = [f"<td>{esc(judge)}<br><small>{esc(name)}</small>"]
    for one in scores.values():
        gap = f"{one['minus_first']:+.3f} {bounds(one['minus_first_ci95'])}; " if one["minus_first_ci95"] else ""
        failures = ", ".join(f"{kind}: {count}" for kind, count in one["failures"].items())
        more = f"{gap}{one['judged']}" + (f" ({failures})" if failures else "")
        if "logprobs" in one["read_from"]:
            counts = one["read_from"]
            more += f"; {counts['logprobs']} answers by log-probabilities, {counts.get('text', 0)} by text"
        if "sd_between_passes" in one:
            more += f"; sd between passes {one['sd_between_passes']:.3f}, equal in {one['equal_passes']:.0%}"
        cells.append(f"<td><b>{number(one['value'])}</b> {bounds(one['ci95'])}<br><small>{esc(more)}</small>")
    return "<tr>" + "".join(cells) + "</tr>"


def group_table(judge: str, scores: dict[str, Any]) -> str:
    """Render one judge's scores by task and by number of sources."""
    text = [f"<details><summary>{esc(judge)}: by task and by number of sources</summary><table><tr><th>"]
    text += [f"<th>{esc(label)}" for label in scores]
    for kind, words in (("by_task", "{}"), ("by_sources", "{} sources")):
        for group in sorted({group for one in scores.values() for group in one[kind]}):
            cells = "".join(f"<td>{number(one[kind].get(group))}" for one in scores.values())
            text.append(f"<tr><td>{esc(words.format(group))}{cells}</tr>")
    return "".join(text) + "</table></details>"


def parts_table(judge: str, scores: dict[str, Any]) -> str:
    """Render the benchmark's other numbers: a row per system and part; "" without any."""
    rows = [(label, part, values) for label, one in scores.items() for part, values in one["parts"].items()]
    if not rows:
        return ""
    columns = list(rows[0][2])
    text = [f"<details open><summary>{esc(judge)}: the benchmark's numbers</summary><table><tr><th>system<th>cases"]
    text += [f"<th>{esc(column)}" for column in columns]
    for label, part, values in rows:
        cells = "".join(f"<td>{number(values.get(column))}" for column in columns)
        text.append(f"<tr><td>{esc(label)}<td>{esc(part)}{cells}</tr>")
    return "".join(text) + "</table></details>"


def case_row(plan: Plan, rows: Rows, judges: list[str], case: Case, out: Path, spent: list[int]) -> str:
    """Render one case. spent: as in ``img``."""
    scores = {label: {judge: rows.get((label, case.id, judge)) for judge in judges} for label in plan.systems}
    bad = "1" if any(row and row.get("failure") for by_judge in scores.values() for row in by_judge.values()) else ""
    text = [f'<tr class=case data-task="{esc(case.task, quote=True)}" data-bad="{bad}"><td class=words>']
    text.append(f"<b>{esc(case.id)}</b> {esc(case.task)}<br>{esc(case.instruction)}<td>")
    text += [img(Path(path), spent) for path in case.sources]
    text.append("<td>" + (img(Path(case.truth), spent) if case.truth else "-"))
    for label, by_judge in scores.items():
        text.append("<td>" + img(result_path(out, label, case), spent))
        text += [score_cell(judge, row) for judge, row in by_judge.items() if row]
    return "".join(text) + "</tr>"


def score_cell(judge: str, row: dict[str, Any]) -> str:
    """Render one score of one picture with the judge's answers, or the failure; "" without either."""
    if row.get("failure"):
        text = f"{judge}: {row['failure']}: {row['message']}"
        return f"<div class=bad>{esc(text)}</div>"
    if row["score"] is None:
        return ""
    name = esc(judge.removeprefix(f"{PIXELS}: "))
    if judge.startswith(PIXELS):
        return f"<div><small>{name}: {row['score']:.2f}</small></div>"
    answers = "\n".join(f"{one['question']}: {one['answer'][:300]}" for one in row.get("readings", []))
    return f"<div>{name}: <b>{row['score']:.2f}</b></div><pre>{esc(answers)}</pre>"


def img(path: Path, spent: list[int]) -> str:
    """Embed a thumbnail. spent: characters of thumbnails so far, updated."""
    picture = thumbnail(path)
    if picture is None:
        return '<span class="bad">no picture</span>'
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    if spent[0] + len(data) > LARGEST:
        return "(omitted: the page would exceed 50 MB)"
    spent[0] += len(data)
    return f'<img src="data:image/jpeg;base64,{data}" alt="">'


def number(value: float | None) -> str:
    """Three decimals; "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def bounds(pair: list[float] | None) -> str:
    """Interval in brackets; "" for None."""
    return f"[{pair[0]:.3f}, {pair[1]:.3f}]" if pair else ""
