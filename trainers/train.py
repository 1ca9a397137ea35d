"""`python -m trainers.train CONFIG [key=value ...]`: start a run, or resume it from its last checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from unipic_core.errors import printable

from .cache import cached_shards
from .config.run import ConfigError, RunConfig, load_config
from .loop.checkpointing import TrainingError
from .loop.loop import train
from .loop.method import Method
from .loop.stages import train_stages
from .tools.memory import GIB, estimate, tokens

if TYPE_CHECKING:
    from .methods.base import NetworkTraining


def make_method(config: RunConfig) -> Method:
    """Create the method of a config; only its modules are imported."""
    if config.method == "vae":
        from .methods.vae import VAETraining

        return VAETraining(config)
    method = network_method(config)
    if config.data is not None and config.data.kind == "scenes":
        from .methods.scenes import on_scenes

        method = on_scenes(method)
    return method(config)


def network_method(config: RunConfig) -> type[NetworkTraining]:
    """Return the class of a method that trains the network."""
    if config.sft is not None:
        from .methods.sft import SFTTraining
        from .methods.sft_text import SFTWithText

        return SFTWithText if config.sft.train_text_encoder else SFTTraining
    if config.method == "consistency":
        from .methods.consistency import ConsistencyTraining

        return ConsistencyTraining
    if config.method == "dmd":
        from .methods.dmd import DMDTraining

        return DMDTraining
    from .methods.joint import JointTraining

    return JointTraining


def announce(stage: RunConfig) -> None:
    """Print the steps, sizes, tokens and, where they are computed, the memory of a stage."""
    if stage.network is None or stage.data is None:
        return
    sizes = f"targets to {stage.data.size}^2, references to {stage.data.reference_budget}^2 pixels"
    text = f"stage {stage.stage}: {stage.steps} steps, {sizes}, at most {tokens(stage)} tokens a sample"
    with suppress(ConfigError):  # of an encoder that trains along it is not computed
        text += f", {estimate(stage, int(os.environ.get('WORLD_SIZE', 1))).gpu / GIB:.1f} GiB of each GPU by arithmetic"
    print(text)


def check_data(stage: RunConfig) -> None:
    """Raise ConfigError if a cache of a stage is missing, incomplete, or of another data set or size, or for scenes
    that cannot be drawn."""
    if stage.data is not None and stage.data.kind == "scenes":
        from .data.endless.stream import check_scenes

        check_scenes(stage.data, stage.batch_size)
    held_out = stage.validation.data if stage.validation is not None else None
    for data in (stage.data, held_out):
        for part in data.parts if data is not None and data.kind != "scenes" else ():
            cached_shards(part)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, see trainers/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=100 optimizer.lr=1e-3")
    parser.add_argument(
        "--allow-config-change",
        action="append",
        default=[],
        metavar="KEY",
        help="a config key that may differ when resuming; repeatable",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        if config.stages:
            exported = train_stages(config, make_method, args.allow_config_change, announce, check_data)
        else:
            exported = train(config, make_method(config), args.allow_config_change)
        print(f"exported to {exported}")
    except (ConfigError, TrainingError, ValueError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(
            f"error: could not read or write {what}; fix that and run the same command again, it resumes from the "
            "last checkpoint",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
