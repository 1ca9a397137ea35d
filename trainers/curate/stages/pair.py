"""Pair: sets of sources that the conflict rules allow, balanced by number and category; rejections are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...digests import digest
from ...progress import Progress
from ..config import PairConfig, Stages
from ..conflicts.rules import Rules, read_rules
from ..conflicts.solve import Solution, solve
from ..errors import CurateError
from ..manifest.shards import Row, RowIndex, StageFolder, shard_ranges

VERSION = 1
BUNDLED = Path(__file__).parents[1] / "conflicts"
SOURCE_KEYS = ("id", "path", "category", "subject", "name", "drawn")


def rules_of(config: PairConfig) -> Rules:
    """Read the conflict rules of a config, bundled ones by name. Raises CurateError."""
    bundled = BUNDLED / f"{config.rules}.yaml"
    return read_rules(bundled if bundled.is_file() else Path(config.rules))


def pair(stages: Stages, config: PairConfig, sources: StageFolder) -> StageFolder:
    """Write composition rows. Raises CurateError if no source can be used."""
    rules, pool = rules_of(config), RowIndex(sources)
    usable = {name: rows for name, rows in pool.categories.items() if name in rules.categories}
    if missing := sorted(set(config.always) - set(usable)):
        raise CurateError(
            f"pair.always: there is no kept source of the category {missing[0]!r}; see the filter's sheets"
        )
    if not usable:
        raise CurateError(
            f"no kept source has a category of the rules ({', '.join(rules.categories)}); it has "
            f"{', '.join(pool.categories) or 'none at all, see the reasons in the manifest'}"
        )
    ranges = shard_ranges(config.rows, stages.rows_per_shard)
    settings = [asdict(config), rules.model_dump(mode="json", by_alias=True), stages.seed, stages.rows_per_shard]
    folder = StageFolder(stages.folder, "pair", digest("pair", VERSION, settings, sources.content), len(ranges))
    progress = Progress("pair", config.rows, unit="rows")
    sampler = Sampler(rules, config, pool, usable, stages.seed)
    for index, rows in enumerate(ranges):
        if folder.done(index):
            progress.skip(len(rows))
            continue
        folder.write(index, [sampler.row(i) for i in rows])
        progress.add(len(rows))
    progress.close()
    return folder


@dataclass
class Sampler:
    """Sampler of composition rows. Row i depends on the seed and i alone, so rows can be made in any order.

    usable: category -> indices of its rows in the pool, int64 [n].
    """

    rules: Rules
    config: PairConfig
    pool: RowIndex
    usable: dict[str, np.ndarray]
    seed: int

    def row(self, i: int) -> Row:
        """One composition row; `rejected` counts the proposals that each rule refused."""
        rng = np.random.default_rng([self.seed, i, VERSION])
        count = self._count(i)
        rejected: Counter[str] = Counter()
        categories = self._categories(count, i, rng, rejected)
        about: Row = {"row": i, "rejected": dict(sorted(rejected.items()))}
        if categories is None:
            reason = f"no set of {count} sources within {self.config.tries} proposals each"
            return {**about, "id": "", "sources": [], "keep": False, "reason": reason}
        order = [categories[j] for j in rng.permutation(len(categories))]
        solution = solve(self.rules, order, turn=i)
        sources = self._sources(order, rng)
        if sources is None or not solution.possible:
            reason = "too few different sources for this set" if solution.possible else "; ".join(solution.broken)
            return {**about, "id": "", "sources": [], "keep": False, "reason": reason}
        return {**about, **_row(sources, solution, i), "keep": True, "reason": ""}

    def _count(self, i: int) -> int:
        """Number of sources, such that every run of rows has the counts in the weights' shares (golden ratio)."""
        counts = sorted(self.config.counts)
        weights = np.array([self.config.counts[count] for count in counts])
        at = (0.5 + i * 0.6180339887498949) % 1.0
        return counts[min(int(np.searchsorted(np.cumsum(weights / weights.sum()), at, "right")), len(counts) - 1)]

    def _categories(self, count: int, i: int, rng: np.random.Generator, rejected: Counter[str]) -> list[str] | None:
        """Grow an allowed set: what is always there, the category whose turn it is, then any that still fits."""
        names = list(self.usable)
        chosen = list(self.config.always)
        persons = [name for name in names if self.rules.categories[name].person]
        while persons and sum(self.rules.categories[name].person for name in chosen) < self.rules.persons_min:
            chosen.append(persons[int(rng.integers(len(persons)))])
        turn = names[i % len(names)]
        proposals = [turn] if turn not in self.config.always else []
        tries = self.config.tries * count
        while len(chosen) < count and tries:
            tries -= 1
            name = proposals.pop() if proposals else names[int(rng.integers(len(names)))]
            extended = [*chosen, name, *self._needed(name, chosen)]
            if len(extended) > count:  # no rule refuses it: there is only no room for what it requires
                continue
            if broken := solve(self.rules, extended).broken:
                rejected.update(broken)
            else:
                chosen = extended
        return chosen if len(chosen) == count else None

    def _needed(self, name: str, chosen: Sequence[str]) -> list[str]:
        """Categories that a rule requires beside this one."""
        needed = [rule.beside for rule in self.rules.require if rule.category == name]
        return [one for one in needed if one not in chosen and one in self.usable]

    def _sources(self, categories: Sequence[str], rng: np.random.Generator) -> list[Row] | None:
        """One source per category; neither a picture nor a group comes twice."""
        taken: set[str] = set()
        sources = []
        for name in categories:
            rows = self.usable[name]
            for _ in range(self.config.tries):
                row = self.pool[int(rows[int(rng.integers(len(rows)))])]
                marks = {row["id"], row.get("group") or row["id"]}
                if not marks & taken:
                    taken |= marks
                    sources.append({key: row[key] for key in SOURCE_KEYS if key in row})
                    break
            else:
                return None
        return sources


def _row(sources: Sequence[Row], solution: Solution, i: int) -> Row:
    slots = [list(seat.slots) for seat in solution.seats]
    hosts = [seat.person for seat in solution.seats]
    key = digest([source["id"] for source in sources], slots, hosts, i)
    return {"id": key, "composition": key, "sources": list(sources), "slots": slots, "hosts": hosts}
