"""The composition set as a source."""

from __future__ import annotations

from typing import Any

from ...config.run import DataConfig
from ...nano.catalogue import Split
from ...nano.emoji import Bank
from ...nano.render import render
from ...nano.scenes import make_scene
from ..rows import Row, make_row


class Compositions:
    """Rows of the composition set, each a pure function of (seed, index)."""

    def __init__(
        self,
        data: DataConfig,
        start: int,
        stop: int,
        split: Split = "train",
        seed: int | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.data, self.start, self.stop, self.split = data, start, stop, split
        self.seed = data.seed if seed is None else seed
        self.bank = bank or Bank.open()

    @property
    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "assets": len(self.bank.by_key)}

    @property
    def note(self) -> str:
        return self.bank.note

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> Row:
        scene = make_scene(self.bank, self.split, self.seed, self.start + i, size=self.data.size)
        sample = render(self.bank, scene)
        return make_row(sample.target, list(sample.references), sample.instruction, self.data.reference_budget)

    def check(self, i: int) -> str:
        return ""  # set.json identifies these rows completely

    def name(self, i: int) -> str:
        return f"{self.split} scene {self.start + i}"
