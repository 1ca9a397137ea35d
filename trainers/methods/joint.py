"""Method `joint`: consistency and distribution matching in one update, L = a L_CM + b L_DMD."""

from __future__ import annotations

from torch import Tensor

from ..config.run import RunConfig, required
from ..loop.metrics import Metrics
from ..roles.types import FAKE_SCORE, Roles
from .consistency import ConsistencyTraining
from .dmd import DMDTraining
from .inputs import Draws, Inputs


class JointTraining(DMDTraining, ConsistencyTraining):
    """The fake score is trained as in `dmd`; the student's loss is the weighted sum of both losses."""

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.weights = required(config.joint)
        super().__init__(config, roles)

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        draws = Draws(self.config.seed, batch)
        if part == FAKE_SCORE:
            return self.fake_score(batch, draws)
        consistency, consistency_metrics = self.consistency(batch, draws)
        matching, matching_metrics = self.matching(batch, draws)
        losses = {"consistency": float(consistency.detach().mean()), "matching": float(matching.detach().mean())}
        total = self.weights.consistency_weight * consistency + self.weights.dmd_weight * matching
        return total, {**consistency_metrics, **matching_metrics, **losses}
