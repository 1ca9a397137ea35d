"""`python -m trainers.train CONFIG [key=value ...]`: start a run, or resume it where its last checkpoint stands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .config import ConfigError, RunConfig, load_config
from .loop import Method, TrainingError, train


def make_method(config: RunConfig) -> Method:
    if config.method == "vae":
        from .vae import VAETraining

        return VAETraining(config)
    from .sft import SFTTraining

    return SFTTraining(config)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainers.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, see trainers/configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=100 optimizer.lr=1e-3")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        print(f"exported to {train(config, make_method(config))}")
    except (ConfigError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
