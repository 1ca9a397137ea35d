"""Config sections of the optimizer and of each training method."""

from __future__ import annotations

from dataclasses import dataclass, field

from .parse import ConfigError, above, at_least, one_of, within

SCHEDULE_FREE = "schedule_free"

BETAS, EPS = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay; the defaults are the paper's SFT values.

    kind: "adamw"; "adamw8bit" (bitsandbytes, on a GPU); "adafactor" (torch), whose lr is relative to the size of each
    tensor; "prodigy" (prodigyopt), which estimates the rate, with lr 1; "schedule_free" (schedulefree): AdamW evaluated
    at an average of its steps, with warm-up and no decay, and ema_decay 0.
    muon_lr: learning rate of Muon for the hidden matrices, the kind training the rest; 0: the kind trains all.
    max_grad_norm: gradient clipping; 0: off.
    """

    kind: str = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.0
    betas: tuple[float, float] = BETAS
    eps: float = EPS
    weight_decay: float = 0.05
    warmup_steps: int = 500
    final_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        one_of(self, "kind", ("adamw", "adamw8bit", "adafactor", "prodigy", SCHEDULE_FREE))
        at_least(self, 0, "lr", "muon_lr", "weight_decay", "warmup_steps", "max_grad_norm")
        above(self, 0, "eps")
        within(self, 0, 1, "final_lr_ratio")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be from 0 to below 1, got {self.betas[0]} and {self.betas[1]}")
        self._check_kind()

    def _check_kind(self) -> None:
        """Raise ConfigError for options that the kind cannot follow."""
        if self.kind in ("prodigy", SCHEDULE_FREE) and self.muon_lr:
            raise ConfigError(f"muon_lr cannot be used with kind {self.kind}, got {self.muon_lr}; set it to 0")
        if self.kind == "prodigy" and not 0.1 <= self.lr <= 10:
            raise ConfigError(f"lr must be near 1 for prodigy, which multiplies its estimate by it, got {self.lr:g}")
        if self.kind == "adafactor" and (self.betas, self.eps) != (BETAS, EPS):
            raise ConfigError("betas and eps are not used by adafactor; remove them")
        if self.kind == SCHEDULE_FREE and self.final_lr_ratio:
            raise ConfigError(f"final_lr_ratio is not used by {SCHEDULE_FREE}, which has no decay; remove it")
        if self.kind == SCHEDULE_FREE and not self.betas[0]:
            raise ConfigError(f"betas must begin above 0 for {SCHEDULE_FREE}, got {self.betas[0]}")


@dataclass(frozen=True)
class VAEMethod:
    """Training of a Qwen-Image VAE from scratch: squared error + L1 + KL to a prior.

    prior: "normal" is N(0, 1); "linear" is N(principal components of the patches, prior_std^2), see vae_prior.py.
    """

    base_dim: int = 16
    num_res_blocks: int = 1
    crop: int = 64
    l1_weight: float = 0.1
    kl_weight: float = 1e-3
    prior: str = "normal"
    prior_std: float = 0.12
    loader_workers: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "base_dim", "num_res_blocks")
        at_least(self, 0, "l1_weight", "kl_weight", "loader_workers")
        above(self, 0, "prior_std")
        one_of(self, "prior", ("normal", "linear"))
        if self.crop not in range(16, 129, 8):
            raise ConfigError(f"vae.crop must be a multiple of 8 from 16 to 128, got {self.crop}")


@dataclass(frozen=True)
class TrainingTimes:
    """Distribution of training times: sigmoid(N(mean, std)), shifted like the sampler's, clamped to least .. most.

    uniform_share: share of samples with a time uniform in uniform_least .. 1 instead, where the layout is decided.
    """

    mean: float = 0.0
    std: float = 1.0
    least: float = 0.0
    most: float = 1.0
    uniform_share: float = 0.0
    uniform_least: float = 0.8

    def __post_init__(self) -> None:
        at_least(self, 0, "std")
        within(self, 0, 1, "uniform_share", "uniform_least")
        if not 0 <= self.least < self.most <= 1:
            raise ConfigError(f"times must have 0 <= least < most <= 1, got {self.least} and {self.most}")


@dataclass(frozen=True)
class Correspondence:
    """Auxiliary loss for data with masks: predict which reference each target token shows.

    weight: of the loss. blocks: a pointer head reads the tokens after each of these blocks (from 0, without the last).
    background: weight of tokens that show the background's reference; the others have weight 1. token_weight: of the
    loss on the attention of `token_blocks`, in each of which some head shall attend from a target token to the token
    of the reference that it shows (endless scenes, attention form full); 0: off. The default blocks are those of the
    small model that learn it by themselves, more slowly.
    """

    weight: float = 0.5
    blocks: tuple[int, ...] = (1, 3)
    background: float = 0.3
    token_weight: float = 0.0
    token_blocks: tuple[int, ...] = (3, 4)

    def __post_init__(self) -> None:
        at_least(self, 0, "weight", "background", "token_weight")
        for name in ("blocks", "token_blocks"):
            blocks = getattr(self, name)
            if not blocks or min(blocks) < 0 or len(set(blocks)) < len(blocks):
                raise ConfigError(f"correspondence.{name} must be distinct block numbers from 0, got {list(blocks)}")


@dataclass(frozen=True)
class MaskedLoss:
    """Loss over the white parts of the rows' masks (losses.weighted_mean). outside: weight of a token outside them."""

    outside: float = 0.0

    def __post_init__(self) -> None:
        within(self, 0, 1, "outside")


@dataclass(frozen=True)
class SFTMethod:
    """Flow matching; the text encoder is frozen or trained jointly. mask: present for a masked loss."""

    train_text_encoder: bool = False
    prompt_dropout: float = 0.1
    times: TrainingTimes = field(default_factory=TrainingTimes)
    correspondence: Correspondence | None = None
    mask: MaskedLoss | None = None

    def __post_init__(self) -> None:
        within(self, 0, 1, "prompt_dropout")


@dataclass(frozen=True)
class ConsistencyMethod:
    """Consistency tuning (UniPic 3, eq. 9-11; losses.py). "released" marks the values of the released code.

    velocity: trajectory on which the student predicts one x0: "teacher" (the frozen base, with `guidance`) or "data"
    (eps - x0; released). guidance: scale to distil; with velocity "data" it adds (guidance - 1) (F(cond) - F(uncond))
    of the base, or of the student's EMA (guidance_from "ema", released: 2.75).
    tangent: finite "difference" (step e) or "jvp". tangent_along: the "velocity" above, or "data" (released; with
    guidance this converges to a different map). normalisation: of the residual, "none" or "rms", or of the "tangent"
    (released). tangent_precision: of its matrix products, "float32", or with tangent jvp "tf32" (emulated on a CPU).
    tangent_warmup: updates over which the tangent's share grows from 0 to 1. times: wider than for flow
    matching, because sampling starts at t = 1. mask: present for a masked loss.
    """

    velocity: str = "teacher"
    guidance: float = 1.0
    guidance_from: str = "base"
    tangent: str = "difference"
    tangent_along: str = "velocity"
    e: float = 5e-3
    normalisation: str = "rms"
    cosine: bool = False
    tangent_warmup: int = 0
    tangent_precision: str = "float32"
    prompt_dropout: float = 0.0
    times: TrainingTimes = field(default_factory=lambda: TrainingTimes(mean=-0.5, std=1.8))
    mask: MaskedLoss | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "guidance", "tangent_warmup")
        within(self, 0, 1, "prompt_dropout")
        one_of(self, "velocity", ("teacher", "data"))
        one_of(self, "guidance_from", ("base", "ema"))
        one_of(self, "tangent", ("difference", "jvp"))
        one_of(self, "tangent_along", ("velocity", "data"))
        one_of(self, "normalisation", ("none", "rms", "tangent"))
        one_of(self, "tangent_precision", ("float32", "tf32"))
        if self.tangent_precision == "tf32" and self.tangent != "jvp":
            raise ConfigError(
                "tangent_precision tf32 needs tangent jvp: a difference divides the rounding by 2e, up to 9.3% of the "
                "tangent (docs/benchmarks.md)"
            )
        if not 0 < self.e <= 0.1:
            raise ConfigError(f"consistency.e must be above 0 and at most 0.1, got {self.e}")
        if self.velocity == "teacher" and self.guidance_from == "ema":
            raise ConfigError(
                "guidance_from ema needs velocity data, got velocity teacher, which is guided by the base"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.velocity == "teacher" or (self.guidance != 1 and self.guidance_from == "base")


@dataclass(frozen=True)
class DMDMethod:
    """Distribution matching (UniPic 3, eq. 12-14; losses.py). The student is rolled out in 1 .. max_steps steps.

    max_steps: also the steps of the exported recipe, without `recipe.steps`. rollout: the number of steps is drawn for
    each training step ("random"), or cycles as in the released code ("released").
    fake_updates: updates of the fake score per update of the student; fake_warmup_steps: initial steps that train only
    the fake score. weighting: "final", "first" or "released", see dmd_direction. optimizer: of the fake score.
    """

    max_steps: int = 4
    rollout: str = "random"
    teacher_guidance: float = 6.0
    weighting: str = "first"
    fake_updates: int = 5
    fake_warmup_steps: int = 0
    times: TrainingTimes = field(default_factory=lambda: TrainingTimes(least=0.02, most=0.98))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=4e-7))

    def __post_init__(self) -> None:
        at_least(self, 1, "max_steps", "fake_updates")
        at_least(self, 0, "fake_warmup_steps", "teacher_guidance")
        one_of(self, "weighting", ("final", "first", "released"))
        one_of(self, "rollout", ("random", "released"))


@dataclass(frozen=True)
class JointMethod:
    """L = consistency_weight L_CM + dmd_weight L_DMD; their options are in the sections consistency and dmd."""

    consistency_weight: float = 1.0
    dmd_weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 0, "consistency_weight", "dmd_weight")
