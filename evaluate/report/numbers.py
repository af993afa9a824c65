"""The measured numbers as rows of a table, and the run card of what they belong to."""

from common.record import Record
from common.text import format_number
from evaluate.metrics.metric import MetricRow
from evaluate.metrics.registry import METRICS


def metric_rows(results: Record) -> list[MetricRow]:
    """All rows of the metrics table, of those metrics that were measured."""
    metrics, halves = results.part("metrics"), results.part("references").part("real_vs_real")
    return [
        row
        for name, metric in METRICS.items()
        if metrics.part(name)
        for row in metric.report_rows(metrics.part(name), halves.part(name))
    ]


def run_card(results: Record) -> list[tuple[str, str]]:
    """(name, value) of the model, sampler, encoder and tiles that the numbers belong to."""
    sampler, encoder = results.part("sampler"), results.part("encoder")
    machine, versions = results.part("hardware"), results.part("versions")
    steps, scale, low, high, seed, variations, batch = (
        format_number(sampler.get(key))
        for key in (
            "steps", "guidance_scale", "guidance_low", "guidance_high", "seed", "variations",
            "micro_batch",
        )
    )  # fmt: skip
    # Scale and interval are recorded even where no guidance used them.
    unguided = sampler.get("guidance") == "none"
    weights_sha256 = str(encoder.get("weights_sha256"))[:16]
    return [
        ("Model", str(results.get("model_sha256") or "unknown")[:16]),
        ("Sampler", f"{sampler.get('solver')}, {steps} steps"),
        (
            "Guidance",
            "none (unconditional)" if unguided else f"{scale} for {low} ≤ t ≤ {high}",
        ),
        ("Seed", f"{seed}; {variations} per condition"),
        ("Arithmetic", f"{sampler.get('compute_dtype')}, batch {batch}"),
        ("Encoder", f"{encoder.get('encoder')}, {format_number(encoder.get('dim'))} features"),
        ("Encoder weights", f"{encoder.get('weights')} ({weights_sha256})"),
        ("Real tiles", _describe_side(results.part("real"))),
        ("Generated tiles", _describe_side(results.part("generated"))),
        ("Software", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Machine", f"{machine.get('cpu_count')} CPU cores, GPU {machine.get('gpu') or 'none'}"),
    ]


def _describe_side(side: Record) -> str:
    plural = "s" if side.count("slides") != 1 else ""
    return (
        f"{side.count('rows'):,} of {side.count('slides'):,} slide{plural}, selection "
        f"“{side.get('selection')}” of {side.get('dataset')}"
    )


def reconstruction_rows(summary: Record) -> list[tuple[str, str, str, str]]:
    """(measure, untrained, trained, better) of the autoencoder, from a run's summary.json."""
    values = summary.part("reconstruction")
    rows = []
    for key, title, better in (
        ("l1", "mean absolute error", "lower"),
        ("psnr", "PSNR, dB", "higher"),
    ):
        before, after = values.get(f"{key}_untrained"), values.get(f"{key}_trained")
        if before is not None and after is not None:
            rows.append((title, format_number(before), format_number(after), better))
    return rows
