"""The measured numbers as rows of a table, each with what to hold it against and what it means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One number: its value, what beside it makes it readable, and its meaning in plain words."""

    name: str
    better: str
    value: str
    reference: str
    reference_name: str
    meaning: str


def show(value: Any, digits: int = 4) -> str:
    """A number with that many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}" if abs(value) < 10_000 else f"{value:,.0f}"


def fixed(value: float | None) -> str:
    """A share or a cosine, with three decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def rows(results: Mapping[str, Any]) -> list[Row]:
    """All rows of the metrics table."""
    metrics = results["metrics"]
    halves = (results["references"] or {}).get("real_vs_real")
    found = _frechet(metrics["frechet_distance"], halves)
    found += _uncertainty(metrics["frechet_distance"])
    found += _manifold(metrics["precision_recall"], halves)
    found += _others(metrics)
    if metrics.get("cosine_similarity"):
        found += _cosine(metrics["cosine_similarity"])
    return found


def _frechet(frechet: Mapping[str, Any], halves: Mapping[str, Any] | None) -> list[Row]:
    real = halves["frechet_distance"] if halves else {}
    size = f"real halves, {show(real.get('n_real'))} a side" if real else "too few real tiles"
    meaning = (
        "How far the generated tiles are from the real ones as two clouds of features: the "
        "difference of their means plus that of their spreads. 0 is identical. Its unit is the "
        "encoder's own and it falls with the number of tiles, so it is read against the numbers "
        "beside it, never against another encoder's."
    )
    floor = (
        "What two sets of exactly these sizes, drawn from one and the same distribution, would "
        "show by chance (closed form). A distance near it cannot be told from a perfect one."
    )
    return [
        Row(
            "Fréchet distance",
            "lower",
            show(frechet["value"]),
            show(real.get("value")),
            size,
            meaning,
        ),
        Row(
            "… noise floor",
            "",
            show(frechet["noise_floor"]),
            show(real.get("noise_floor")),
            size if real else "",
            floor,
        ),
        Row(
            "… of means / of spreads",
            "lower",
            f"{show(frechet['mean_term'])} / {show(frechet['covariance_term'])}",
            f"{show(real.get('mean_term'))} / {show(real.get('covariance_term'))}",
            size if real else "",
            "The two terms of the distance. A large first one is a common shift, as of colour; a "
            "large second one is missing or surplus variety.",
        ),
    ]


def _uncertainty(frechet: Mapping[str, Any]) -> list[Row]:
    """The interval of the cluster bootstrap by slide, and the distance without finite-set bias."""
    found = []
    width = (frechet.get("widths") or {}).get("slide")
    if width:
        found.append(
            Row(
                "… 95 % interval",
                "",
                f"{show(width['low'])} to {show(width['high'])}",
                show(width["draws"]),
                "draws of whole slides",
                "How far the distance would move with other slides of the same kind, tiles of a "
                "slide being alike. Two models whose intervals overlap are not told apart.",
            )
        )
    line = frechet.get("infinity")
    if line:
        found.append(
            Row(
                "… at infinitely many images",
                "lower",
                show(line["value"]),
                show(frechet["value"]),
                f"with {show(frechet['n_generated'])}",
                "The distance extrapolated along 1/N, so that numbers taken with different counts "
                "can be compared. Noise can take it below zero where the sets are alike.",
            )
        )
    return found


def _others(metrics: Mapping[str, Any]) -> list[Row]:
    """FLD, KID and MIND, where they were measured."""
    found = []
    fld = metrics.get("feature_likelihood")
    if fld:
        spread = f" ± {show(fld['std'], 2)}" if fld["std"] is not None else ""
        found.append(
            Row(
                "Feature likelihood divergence",
                "lower",
                show(fld["value"]) + spread,
                fixed(0.0),
                "real training tiles",
                "How well the generated tiles explain unseen real ones, against real training "
                "tiles. Copies of training tiles make it huge. ± is over seeds.",
            )
        )
    kernel = metrics.get("kernel_distance")
    if kernel:
        found.append(
            Row(
                "Kernel distance (KID)",
                "lower",
                show(kernel["value"]),
                fixed(0.0),
                "equal distributions",
                "Like the Fréchet distance, without taking the clouds for Gaussians and without "
                "its bias; slightly negative values are legitimate.",
            )
        )
    sliced = metrics.get("sliced_distance")
    if sliced:
        found.append(
            Row(
                "Sliced distance (MIND)",
                "lower",
                show(sliced["value"]),
                fixed(0.0),
                "equal sets",
                "The mean distance along random directions, on the scale of a Fréchet distance; "
                "it needs fewer tiles to settle.",
            )
        )
    return found


_MANIFOLD = (
    (
        "precision",
        "Precision",
        "Share of generated tiles that fall among the real ones (within the distance of some real "
        "tile to its real neighbour number {k}): do they look real?",
    ),
    (
        "recall",
        "Recall",
        "Share of real tiles that fall among the generated ones: is the variety of the real "
        "tissue covered?",
    ),
    (
        "density",
        "Density",
        "Like precision, but counts how many real neighbourhoods hold a generated tile, so one "
        "real outlier weighs little; about 1 for equal distributions, can exceed it.",
    ),
    (
        "coverage",
        "Coverage",
        "Share of real tiles with at least one generated tile in their neighbourhood: recall that "
        "outliers among the generated tiles cannot inflate.",
    ),
)


def _manifold(manifold: Mapping[str, Any], halves: Mapping[str, Any] | None) -> list[Row]:
    real = halves["precision_recall"] if halves else {}
    k = manifold.get("k", 3)
    return [
        Row(
            title,
            "higher",
            fixed(manifold[key]),
            fixed(real.get(key)),
            "real halves" if real else "too few real tiles",
            meaning.format(k=k),
        )
        for key, title, meaning in _MANIFOLD
        if manifold.get(key) is not None
    ]


def _cosine(cosine: Mapping[str, Any]) -> list[Row]:
    pool = cosine["retrieval_pool"]
    return [
        Row(
            "Cosine to the source tile",
            "higher",
            f"{fixed(cosine['mean'])} ± {fixed(cosine['std'])}",
            fixed(cosine["null_mean"]),
            "sources shuffled",
            "How alike the features of a generated tile and of the real tile that guided it are; "
            "1 is the same direction. Any two tiles share much, so what counts is how far it lies "
            "above the shuffled pairing.",
        ),
        Row(
            "Cosine, centred",
            "higher",
            fixed(cosine["centred_mean"]),
            fixed(0.0),
            "no relation",
            "The same after the mean of the real features was taken from both sides, which "
            "removes what all tiles share.",
        ),
        Row(
            "Source found first",
            "higher",
            fixed(cosine["retrieval_at_1"]),
            fixed(1 / pool),
            f"chance among {pool:,}",
            "Share of generated tiles whose own source is the most similar of all source tiles.",
        ),
    ]


def card(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run card: which model, sampler, encoder and tiles the numbers belong to."""
    sampler, encoder = results["sampler"], results["encoder"]
    real, generated = results["real"], results["generated"]
    low, high = sampler.get("guidance_low"), sampler.get("guidance_high")
    unguided = sampler.get("guidance") == "none"
    scale = f"{show(sampler.get('guidance_scale'))} for {show(low)} ≤ t ≤ {show(high)}"
    versions = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
    machine = results.get("hardware", {})
    return [
        ("Model", str(results.get("model_sha256") or "unknown")[:16]),
        ("Sampler", f"{sampler.get('solver')}, {show(sampler.get('steps'))} steps"),
        ("Guidance", "none (unconditional)" if unguided else scale),
        ("Seed", f"{show(sampler.get('seed'))}; {show(sampler.get('variations'))} per condition"),
        ("Arithmetic", f"{sampler.get('compute_dtype')}, batch {show(sampler.get('micro_batch'))}"),
        ("Encoder", f"{encoder.get('encoder')}, {show(encoder.get('dim'))} features"),
        (
            "Encoder weights",
            f"{encoder.get('weights')} ({str(encoder.get('weights_sha256'))[:16]})",
        ),
        ("Real tiles", _side(real)),
        ("Generated tiles", _side(generated)),
        ("Software", versions),
        ("Machine", f"{machine.get('cpu_count')} CPU cores, GPU {machine.get('gpu') or 'none'}"),
    ]


def _side(side: Mapping[str, Any]) -> str:
    many = "s" if side["slides"] != 1 else ""
    return (
        f"{side['rows']:,} of {side['slides']:,} slide{many}, selection "
        f"“{side['selection']}” of {side['dataset']}"
    )


def reconstruction(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, untrained, trained, better) rows of the autoencoder, from summary.json."""
    found = summary.get("reconstruction") or {}
    names = (("l1", "mean absolute error", "lower"), ("psnr", "PSNR, dB", "higher"))
    return [
        (title, show(found[f"{key}_untrained"]), show(found[f"{key}_trained"]), better)
        for key, title, better in names
        if f"{key}_untrained" in found and f"{key}_trained" in found
    ]
