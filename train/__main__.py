"""The command line of training: `python -m train`, and `python -m train export`."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.console import EXIT_USAGE, run_door
from common.errors import UserError

CONFIGS = Path(__file__).parent / "configs"

_AFTER_FIRST_S = 3.0
"""A mistake of the command line is reported once per machine: torchrun ends all processes with
the first that leaves, so the others stay until that one has reported it."""

_TRAIN_HELP = """\
Train an SD-VAE and a SiT together (REPA-E), or a SiT on a frozen VAE (run.mode=repa or ldm), on
the tiles and features of a dataset.

  python -m train --config tiny data.dataset=DATASET run.dir=RUN
  python -m common.launch 8 train --config cytosyn-40m data.dataset=DATASET run.dir=RUN

The same command continues a run that was stopped, and does nothing in a finished one. Ctrl-C,
SIGTERM, SIGUSR1 and SIGHUP finish the step, save the state and exit with status 75; start the same
command again afterwards. A second Ctrl-C ends at once, without saving.
"""

_EXPORT_HELP = """\
Write a run's model as config.json and safetensors, for model.CytoSyn.from_pretrained(DIR).

  python -m train export RUN DIR --sit ema --vae raw

The default weights are those in the run's configuration (export.sit, export.vae).
"""


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and run it; the exit status."""
    if arguments[:1] == ["export"]:
        options = export_parser().parse_args(arguments[1:])
        from train.export import export_run

        export_run(options.run, options.out, sit=options.sit, vae=options.vae, step=options.step)
        return 0
    from train.signals import leaving_early

    with leaving_early():
        return _run_training(arguments)


def _run_training(arguments: Sequence[str]) -> int:
    options = train_parser().parse_intermixed_args(arguments)
    # Before torch is loaded. On cores shared with other work, threads that spin while they wait
    # made a CPU run take 2.5 to 4 times as long as threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from train.config import load_config
    from train.loop import train

    overrides = list(options.overrides)
    if options.device:
        overrides.append(f"run.device={options.device}")
    try:
        config = load_config(_find_config(options.config), overrides)
    except UserError:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            raise
        time.sleep(_AFTER_FIRST_S)
        return EXIT_USAGE
    return train(config, options.resume)


def train_parser() -> argparse.ArgumentParser:
    """The options of `python -m train`."""
    parser = _make_parser("python -m train", _TRAIN_HELP)
    parser.add_argument("--config", required=True, metavar="FILE",
                        help=f"a YAML file, or a preset: {_preset_names()}")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="set keys of the configuration, as in optim.lr_sit=2e-4")  # fmt: skip
    parser.add_argument("--resume", choices=("auto", "never"), default="auto",
                        help="auto (default): continue from the newest checkpoint; "
                        "never: refuse a run directory that has one")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"),
                        help="short for run.device=DEVICE")  # fmt: skip
    parser.epilog = (
        "All keys, with REPA-E's values as defaults, are in RUN/config.yaml once a run has "
        f"started, and in {CONFIGS.parent / 'config.py'}."
    )
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The options of `python -m train export`."""
    parser = _make_parser("python -m train export", _EXPORT_HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("out", type=Path, metavar="DIR", help="where the model is written")
    for name, network in (("sit", "the SiT and its latent statistics"), ("vae", "the VAE")):
        parser.add_argument(f"--{name}", choices=("ema", "raw"),
                            help=f"{network}: moving average or last step's weights")  # fmt: skip
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    return parser


def _make_parser(program: str, text: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=program, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _preset_names() -> str:
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def _find_config(name: str) -> Path:
    """The file of that path, or the preset of that name."""
    path, preset = Path(name), CONFIGS / f"{name}.yaml"
    if not path.exists() and preset.exists():
        return preset
    if not path.exists():
        raise UserError(f"--config {name}: no such file, nor a preset (presets: {_preset_names()})")
    return path


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("common", "train", "model", "pipeline"))
