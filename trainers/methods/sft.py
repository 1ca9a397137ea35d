"""Method `sft`: flow matching of the network on cached latents, the text encoder frozen."""

from __future__ import annotations

from torch import Tensor

from unipic_core.sampling.flow import add_noise
from unipic_core.weights.recipe import Recipe

from ..config.run import RunConfig, given
from ..loop.metrics import Metrics
from ..roles.types import STUDENT, Roles
from .base import Draws, Inputs, NetworkTraining
from .losses import flow_matching_loss


class SFTTraining(NetworkTraining):
    """The student learns eps - x0; nobody teaches it."""

    recipe = Recipe()  # sampled as its base is

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.options = given(config.sft)
        self.prompt_dropout = self.options.prompt_dropout
        super().__init__(config, roles)

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        draws = Draws(self.config.seed, batch)
        t, eps = self.times(draws, self.options.times), draws.noise()
        v = self.role(STUDENT, batch)(add_noise(batch.x0, eps, t), t)
        return flow_matching_loss(v, batch.x0, eps), {}
