"""The door of `evaluate`: `python -m evaluate generate | measure | report`.

`torchrun --nproc-per-node N -m evaluate generate ...` splits the images over N processes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from pipeline.console import EXIT_OK, format_bytes, format_seconds, run_door, say

_WIDE = argparse.ArgumentDefaultsHelpFormatter


def parser() -> argparse.ArgumentParser:
    """All options of the three commands."""
    top = argparse.ArgumentParser(prog="python -m evaluate", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_measure(commands)
    _add_report(commands)
    return top


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "generate",
        help="make a synthetic dataset with a model",
        description="Make a synthetic dataset with a model. The same command goes on where an "
        "interrupted one stopped; a larger --limit adds images.",
        formatter_class=_WIDE,
    )
    it.set_defaults(run=_generate)
    it.add_argument("--model", required=True, help="exported model: a directory or a hub id")
    it.add_argument("--out", type=Path, required=True, help="synthetic dataset, new or begun")
    what = it.add_argument_group("guidance")
    what.add_argument("--guidance", type=Path, metavar="DATASET", help="real dataset that guides")
    what.add_argument("--selection", metavar="NAME", help="its selection that guides")
    what.add_argument("--encoder", default="h0-mini", help="whose cached CLS features guide")
    what.add_argument("--unconditional", action="store_true", help="guide by nothing, with --count")
    what.add_argument("--count", type=int, metavar="N", help="images, with --unconditional")
    what.add_argument("--limit", type=int, metavar="N", help="use only N tiles of the selection")
    what.add_argument("--variations", type=int, default=1, metavar="K", help="images per tile")
    what.add_argument("--force", action="store_true", help="let another encoder's features guide")
    how = it.add_argument_group("sampler")
    how.add_argument("--steps", type=int, default=250, help="solver steps")
    how.add_argument("--solver", choices=("sde", "ode", "heun", "dpm"), default="sde", help=" ")
    how.add_argument("--scale", type=float, default=2.5, help="guidance scale; 1 is none")
    how.add_argument("--low", type=float, default=0.0, help="guide from this time on")
    how.add_argument("--high", type=float, default=0.75, help="guide up to this time; 1 is noise")
    how.add_argument("--seed", type=int, default=0, help="of all images; each has its own from it")
    how.add_argument("--batch", type=int, default=16, help="images a call; part of the identity")
    where = it.add_argument_group("machine")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=" ")
    where.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the network; auto is bfloat16 on a GPU and float32 on a CPU",
    )


def _add_measure(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "measure",
        help="compare a synthetic dataset with a real one",
        description="Compare a synthetic dataset with a real one, from the CLS features that "
        "`python -m pipeline cache` made of both.",
        formatter_class=_WIDE,
    )
    it.set_defaults(run=_measure)
    it.add_argument("--real", type=Path, required=True, metavar="DATASET", help="real dataset")
    it.add_argument("--real-selection", required=True, metavar="NAME", help="its selection")
    it.add_argument("--generated", type=Path, required=True, metavar="SYN", help="synthetic one")
    it.add_argument("--generated-selection", default="generated", metavar="NAME", help=" ")
    it.add_argument(
        "--guidance", type=Path, metavar="DATASET", help="holds the source tiles, if not --real"
    )
    it.add_argument("--encoder", default="h0-mini", help="whose features are compared")
    it.add_argument("--out", type=Path, default=Path("results.json"), help="results file")


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    it = commands.add_parser(
        "report",
        help="write a page that shows it all",
        description="Write one HTML page that holds everything it shows and needs no network.",
        formatter_class=_WIDE,
    )
    it.set_defaults(run=_report)
    it.add_argument("--results", type=Path, required=True, help="results.json of measure")
    it.add_argument("--run", type=Path, dest="run_dir", metavar="RUN", help="training run")
    it.add_argument("--dataset", type=Path, required=True, metavar="DATASET", help="real dataset")
    it.add_argument("--generated", type=Path, required=True, metavar="SYN", help="synthetic one")
    it.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    it.add_argument("--picture", type=Path, metavar="FILE.png", help="also a small picture of it")


def _generate(options: argparse.Namespace) -> int:
    from evaluate.generate.command import generate_command

    return generate_command(options)


def _measure(options: argparse.Namespace) -> int:
    from evaluate.measure import Side, measure
    from evaluate.results import write_results
    from pipeline.dataset import open_dataset

    real = Side.open(options.real, options.real_selection, options.encoder, like=None)
    generated = Side.open(
        options.generated, options.generated_selection, options.encoder, like=real
    )
    guidance = open_dataset(options.guidance) if options.guidance else None
    results = measure(real, generated, guidance)
    write_results(options.out, results)
    for one in results["warnings"]:
        say(f"warning: {one['message']}")
    metrics = results["metrics"]
    frechet, cosine = metrics["frechet_distance"], metrics["cosine_similarity"]
    say(
        f"measure: Fréchet distance {frechet['value']:.4g} (noise floor "
        f"{frechet['noise_floor']:.4g}), precision {metrics['precision_recall']['precision']:.3f}, "
        f"recall {metrics['precision_recall']['recall']:.3f}"
        + (f", cosine {cosine['mean']:.3f} (shuffled {cosine['null_mean']:.3f})" if cosine else "")
    )
    tiles = len(real.features) + len(generated.features)
    say(
        f"measure: {len(generated.features):,} generated against {len(real.features):,} real tiles "
        f"in {format_seconds(results['seconds'])} ({tiles / max(results['seconds'], 1e-9):,.0f} "
        f"tiles/s); wrote {options.out}"
    )
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from evaluate.report.command import write_report

    written = write_report(
        results_file=options.results,
        run_dir=options.run_dir,
        real=options.dataset,
        generated=options.generated,
        out=options.out,
        picture_file=options.picture,
    )
    for path in written:
        say(f"report: wrote {path}, {format_bytes(path.stat().st_size)}")
    return EXIT_OK


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    for name in ("steps", "batch", "variations", "limit", "count"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a whole number of 1 or more")
    return int(options.run(options))


if __name__ == "__main__":
    run_door(lambda: main(sys.argv[1:]), ("evaluate", "model", "pipeline"))
