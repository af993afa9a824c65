"""The door of the train room: `python -m train`, and `python -m train export`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.console import EXIT_USAGE, run_door
from common.errors import UserError

CONFIGS = Path(__file__).parent / "configs"

_AFTER_YOU_S = 3.0
"""A mistake of the command line is told once a machine: torchrun ends all with the first that
leaves, so the others stay until that has told it."""

_TRAIN_HELP = """\
Train a REPA-E model (SD-VAE and SiT together) on the tiles and features of a dataset.

  python -m train --config tiny data.dataset=DATASET run.dir=RUN
  torchrun --nproc-per-node 8 -m train --config cytosyn-40m data.dataset=DATASET run.dir=RUN

The same command goes on with a run that was stopped, and does nothing in a finished one. SIGTERM
and SIGUSR1 save the state and exit with status 75; start the same command again after it.
"""

_EXPORT_HELP = """\
Write a run's model as config.json and safetensors, for model.CytoSyn.from_pretrained(DIR).

  python -m train export RUN DIR --sit ema --vae raw

Without options the weights are those that the run's configuration names (export.sit, export.vae).
"""


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and run it; the exit status."""
    if arguments[:1] == ["export"]:
        return _export(arguments[1:])
    return _train(arguments)


def _train(arguments: Sequence[str]) -> int:
    options = _train_parser().parse_intermixed_args(arguments)
    # Before torch is loaded. On cores shared with other work, threads that spin while they wait
    # made a CPU run take 2.5 to 4 times as long as threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from train.config import load_config
    from train.loop import train

    overrides = list(options.overrides)
    if options.device:
        overrides.append(f"run.device={options.device}")
    try:
        config = load_config(_config_file(options.config), overrides)
    except UserError:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            raise
        time.sleep(_AFTER_YOU_S)
        return EXIT_USAGE
    return train(config, options.resume)


def _export(arguments: Sequence[str]) -> int:
    options = _export_parser().parse_args(arguments)
    from train.export import export_run

    export_run(options.run, options.out, sit=options.sit, vae=options.vae, step=options.step)
    return 0


def _train_parser() -> argparse.ArgumentParser:
    parser = _parser("python -m train", _TRAIN_HELP)
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument(
        "--config", required=True, metavar="FILE", help=f"a YAML file, or a preset: {names}"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set keys, as in optim.lr_sit=2e-4"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default) goes on from the newest checkpoint; never refuses to",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="short for run.device=..."
    )
    keys = "all keys, with the defaults of REPA-E, stand in RUN/config.yaml after a start and in"
    parser.epilog = f"{keys} {CONFIGS.parent / 'config.py'}"
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _parser("python -m train export", _EXPORT_HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("out", type=Path, metavar="DIR", help="where the model is written")
    parser.add_argument("--sit", choices=("ema", "raw"), help="the SiT and its latent statistics")
    parser.add_argument("--vae", choices=("ema", "raw"), help="the VAE")
    parser.add_argument("--step", type=int, help="a checkpoint's step; default is the newest")
    return parser


def _parser(program: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _config_file(name: str) -> Path:
    """The file of that path, or the preset of that name."""
    path, preset = Path(name), CONFIGS / f"{name}.yaml"
    if not path.exists() and preset.exists():
        return preset
    if not path.exists():
        names = ", ".join(sorted(found.stem for found in CONFIGS.glob("*.yaml")))
        raise UserError(f"--config {name}: no such file, nor a preset (presets: {names})")
    return path


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("common", "train", "model", "pipeline"))
