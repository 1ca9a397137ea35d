"""`python -m trainers.train CONFIG [key=value ...]`: start a run, or resume it where its last checkpoint stands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .config import ConfigError, RunConfig, load_config
from .loop import Method, TrainingError, train


def make_method(config: RunConfig) -> Method:
    """The method that the config names."""
    if config.method == "vae":
        from .vae import VAETraining

        return VAETraining(config)
    if config.method == "sft":
        from .sft import SFTTraining

        return SFTTraining(config)
    raise ConfigError(f"no trainer for the method {config.method!r}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, see trainers/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=100 optimizer.lr=1e-3")
    parser.add_argument(
        "--allow-config-change", nargs="+", default=[], metavar="KEY", help="config keys that may differ on resuming"
    )
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        print(f"exported to {train(config, make_method(config), args.allow_config_change)}")
    except (ConfigError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
