"""A method without pictures for the tests of the loop; also a program, so that it can be killed or run in parallel.

python loop_toy.py OUTPUT STEPS [MOMENT]: with a moment it dies there as by kill -9
"""

import importlib
import itertools
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from trainers.config.methods import OptimizerConfig
from trainers.config.run import RunConfig
from trainers.loop.export import Export
from trainers.loop.loop import train
from trainers.loop.method import Batch, Method, Share


@dataclass(frozen=True)
class Points:
    x: Tensor
    index: int
    name: str
    counts: bool = True

    def to(self, device):
        return replace(self, x=self.x.to(device))


class Toy(Method):
    """Regression of the student on data that is a function of the micro step; a second part trains twice a step.

    fail_at: micro step that is interrupted; bad_loss_at: one whose second sample has no loss; dropout: of the
    student's inputs, from torch's global random state; options: of the student's optimizers.
    """

    slots = 3

    def __init__(self, fail_at=None, bad_loss_at=None, dropout=0.0, options=None):
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.other = nn.Linear(6, 2)
        self.ema = [p.detach().clone() for p in self.student.parameters()]
        self.fail_at, self.bad_loss_at = fail_at, bad_loss_at
        self.options = options or optimizer()
        self.share = Share()

    def place(self, device, share):
        self.share = share

    def updates(self, step):
        return ("other", "other", "student")

    def trained(self, part):
        return list((self.student if part == "student" else self.other).named_parameters())

    def averaged(self):
        return list(zip(self.ema, self.student.parameters(), strict=True))

    def optimizer(self, part):
        return self.options if part == "student" else OptimizerConfig(lr=5e-3, warmup_steps=1)

    def batch(self, index):
        if index == self.fail_at:
            raise KeyboardInterrupt
        whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(index))
        return Batch.of_one(Points(whole[self.share.part(4)], index, f"points {index}"))

    def loss(self, part, batch):
        model = self.student if part == "student" else self.other
        losses = (model(batch.x) - batch.x[:, :2]).square().mean(1)
        if batch.index == self.bad_loss_at:
            losses = losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])
        return losses, {"half": float(losses.detach().mean()) / 2}

    def preview(self):
        return Image.new("RGB", (8, 8))

    def exports(self):
        return [Export("ema.pt", 0, lambda folder: torch.save(self.ema, folder / "ema.pt"))]


def optimizer(lr=1e-2):
    return OptimizerConfig(lr=lr, muon_lr=1e-2, warmup_steps=3)


def config(output, **changes):
    values = {
        "method": "vae",
        "output": str(output),
        "batch_size": 4,
        "steps": 12,
        "accumulation": 2,
        "save_every": 4,
        "sample_every": 6,
        "log_every": 1,
        "optimizer": optimizer(),
    }
    return RunConfig(**{**values, **changes})


MOMENTS = {
    "trains": ("trainers.loop.loop", "backward", 46),
    "writes a checkpoint": ("torch", "save", 2),
    "starts": ("trainers.loop.loop", "backward", 1),
}
"""Name -> the function of a module after whose nth return the program dies."""


def die_after(module, name, calls):
    owner, count = importlib.import_module(module), itertools.count(1)
    real = getattr(owner, name)

    def deadly(*args, **kwargs):
        made = real(*args, **kwargs)
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(owner, name, deadly)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for moment in sys.argv[3:]:
        die_after(*MOMENTS[moment])
    train(config(Path(sys.argv[1]), steps=int(sys.argv[2])), Toy())
