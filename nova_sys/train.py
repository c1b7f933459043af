"""Trains one recipe on this process's rank: `torchrun ... -m nova_sys.train RECIPE [--set key=value ...]`.

`nova train RECIPE --nproc N` starts N such processes on one machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nova_sys.config_io import check, load_recipe
from nova_sys.errors import exit_on_user_error
from nova_sys.log import setup_logging
from nova_sys.stopping import stop_signals


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup_logging()
    with exit_on_user_error(), stop_signals() as stop:
        config = load_recipe(args.recipe, args.set)
        from nova_sys.model.build import check_kernels
        from nova_sys.model.te import check_precision
        from nova_sys.parallel import current_world_size, parallel_run
        from nova_sys.trainer import Trainer

        check(config, current_world_size())
        hangs = Path(config.run.dir) / "hangs"
        with parallel_run(config.parallel, seed=config.train.seed, hangs_dir=hangs) as parallel:
            logging.getLogger(__name__).info("%s", parallel.describe())
            check_kernels(config.train.kernels, parallel.device)
            check_precision(config.train.precision, config.fp8, parallel.device)
            Trainer(config, parallel, stop).train()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nova_sys.train", description=__doc__)
    parser.add_argument("recipe", help="TOML file of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="overrides a key of the recipe",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
