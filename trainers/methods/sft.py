"""Method `sft`: flow matching with a frozen text encoder (UniPic 3, eq. 1)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from unipic_core.run.plan import resolve
from unipic_core.sampling.flow import add_noise
from unipic_core.sampling.schedules import rounded_time
from unipic_core.weights.recipe import Recipe, recipe_of

from ..config.methods import Correspondence
from ..config.run import ConfigError, RunConfig, required
from ..loop.method import Share
from ..loop.metrics import Metrics
from ..roles.roles import AdapterRoles, FullRoles
from ..roles.types import STUDENT, NamedParameters, Roles
from .base import NetworkTraining
from .correspondence import CorrespondenceLoss
from .inputs import Draws, Inputs
from .losses import flow_matching_loss
from .token_pointer import Recorded, TokenPointer


class SFTTraining(NetworkTraining):
    """The student learns the velocity eps - x0 of the data, without a teacher."""

    recipe = Recipe()  # sampled as its base is

    def __init__(self, config: RunConfig, roles: Roles | None = None) -> None:
        self.options = required(config.sft)
        self.prompt_dropout, self.masked_loss = self.options.prompt_dropout, self.options.mask
        super().__init__(config, roles)
        self.time_rounding = resolve(recipe_of(self.base)).time_rounding
        """In bfloat16 the release draws times in that type, and rounds them again for the network."""
        self.correspondence: CorrespondenceLoss | None = None
        self.token_pointer: TokenPointer | None = None
        if (options := self.options.correspondence) is not None:
            self.correspondence = self.pointer_heads(options)
            if options.token_weight:
                form = self.roles.config_of(STUDENT).attention_form
                self.token_pointer = TokenPointer(options, self.correspondence.network[0], form)

    def pointer_heads(self, options: Correspondence) -> CorrespondenceLoss:
        """Create the pointer heads on the student's network. Raises ConfigError if the config does not allow them."""
        if self.data.kind != "scenes":
            raise ConfigError(f"sft.correspondence needs data with masks, data.kind scenes, got {self.data.kind}")
        if self.network_config.shard:
            raise ConfigError("sft.correspondence needs whole networks, got network.shard true; set it to false")
        if isinstance(self.roles, FullRoles):
            return CorrespondenceLoss(options, self.roles.network(STUDENT), self.config.seed)
        assert isinstance(self.roles, AdapterRoles)  # the only other class
        return CorrespondenceLoss(options, self.roles.network, self.config.seed)

    def place(self, device: torch.device, share: Share) -> None:
        super().place(device, share)
        if self.correspondence is not None:
            self.correspondence.to(device)

    def trained(self, part: str) -> NamedParameters:
        heads = [] if self.correspondence is None else self.correspondence.named_parameters()
        return super().trained(part) + [(f"correspondence.{name}", p) for name, p in heads]

    def loss(self, part: str, batch: Inputs) -> tuple[Tensor, Metrics]:
        draws = Draws(self.config.seed, batch)
        t, eps = self.times(draws, self.options.times), draws.noise()
        if self.time_rounding != "none":
            t = rounded_time(t, "bf16", self.activations)
        x_t, t = add_noise(batch.x0, eps, t), rounded_time(t, self.time_rounding, self.activations)
        if self.correspondence is None:
            return flow_matching_loss(self.role(STUDENT, batch)(x_t, t), batch.x0, eps, self.weights_of(batch)), {}
        assert batch.owners is not None  # set for data with masks
        assert batch.dropped is not None
        with self.correspondence.recording() as outputs, self.token_attention() as attended:
            v = self.role(STUDENT, batch)(x_t, t)
        loss = flow_matching_loss(v, batch.x0, eps, self.weights_of(batch))
        pointer_loss, metrics = self.correspondence(outputs, batch.latents, batch.owners, batch.dropped, t)
        metrics = {"flow_matching": float(loss.detach().mean()), **metrics}
        if self.token_pointer is None:
            return loss + pointer_loss, metrics
        assert batch.shown is not None  # set for endless scenes, the data with masks
        weights = batch.shown.weights(batch.owners, self.token_pointer.options.background, batch.dropped)
        token_loss, of_tokens = self.token_pointer(attended, batch.latents, batch.shown, weights)
        return loss + pointer_loss + token_loss, {**metrics, **of_tokens}

    def token_attention(self) -> AbstractContextManager[Recorded]:
        """Record queries and keys of the blocks of the token pointer loss, if it is on."""
        return nullcontext({}) if self.token_pointer is None else self.token_pointer.recording()
