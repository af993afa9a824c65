"""The `measure` command: open both sides, measure, write results.json, report in a few lines."""

from pathlib import Path

from common.console import EXIT_FAILURES, EXIT_OK, print_line
from common.record import Record
from common.text import format_seconds
from common.torch_processes import choose_device
from evaluate.compare.config import MeasureConfig
from evaluate.compare.measure import measure
from evaluate.compare.results import check_writable, write_results
from evaluate.compare.sides import FeatureSide
from evaluate.metrics.metric import MetricSettings
from evaluate.metrics.registry import summarise_metrics
from pipeline.dataset import open_dataset


def measure_command(config: MeasureConfig) -> int:
    """Run the command; returns the exit status."""
    # Refuses a seed or a device before gigabytes are read.
    settings = MetricSettings(draws=config.draws, seed=config.seed)
    device = choose_device(config.device).type
    check_writable(config.out)

    def open_side(root: Path, selection: str, like: FeatureSide | None) -> FeatureSide:
        return FeatureSide.open_selection(
            root, selection, config.encoder, like=like, view=config.view, tile_px=config.tile_px
        )

    real = open_side(config.real, config.real_selection, None)
    generated = open_side(config.generated, config.generated_selection, real)
    guidance = open_dataset(config.guidance) if config.guidance else None
    train = None
    if config.train_selection:
        train = open_side(config.guidance or config.real, config.train_selection, real)
    results = measure(real, generated, guidance, train=train, settings=settings, device=device)
    write_results(config.out, results)

    record = Record(results, str(config.out))
    for warning in record.parts("warnings"):
        print_line(f"warning: {warning['message']}")
    if summaries := summarise_metrics(record):
        print_line(f"measure: {', '.join(summaries)}")
    tiles, seconds = len(real.features) + len(generated.features), record.number("seconds")
    print_line(
        f"measure: {len(generated.features):,} generated against {len(real.features):,} real tiles "
        f"in {format_seconds(seconds)} ({tiles / max(seconds, 1e-9):,.0f} tiles/s); "
        f"wrote {config.out}"
    )
    return EXIT_FAILURES if record.part("failed") else EXIT_OK
