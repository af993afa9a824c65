"""What makes measured numbers doubtful: warnings as {code, message}, whose codes are stable."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from common.record import Record
from evaluate.compare.inputs import InputFault
from evaluate.compare.results import make_warning
from evaluate.compare.sides import FeatureSide
from evaluate.metrics.registry import METRICS
from pipeline.dataset import Dataset, Selection
from pipeline.dataset.hold_outs import find_leaks, is_hold_out

FEW_TILES = 1000
"""Below so many tiles numbers are noisy and biased."""
_BLOCKINESS_GAP = 0.02
"""On 100 TCGA tiles the mean is 0.998 as PNG, 1.020 at JPEG quality 90, 1.112 at 75."""
_PLACES_NAMED = 3
"""Places named in a warning; of more their number is enough."""


def set_warnings(
    real: FeatureSide, generated: FeatureSide, identity: Mapping[str, object]
) -> list[dict[str, str]]:
    """What makes numbers between these two sides doubtful."""
    from model.encoders import is_of_photographs  # torchvision takes seconds to import

    warnings = []
    record = real.store.record
    if record.get("random_weights"):
        warnings.append(
            make_warning(
                "random_encoder_weights",
                f"the encoder {record['encoder']} has random weights ({record['weights']}): "
                "no number here says anything about image quality",
            )
        )
    elif is_of_photographs(str(record.get("encoder"))):
        warnings.append(
            make_warning(
                "photograph_encoder",
                f"the encoder {record['encoder']} was trained on photographs, not on tissue: "
                "compare its numbers with one another and with the noise floor alone",
            )
        )
    for side, name in ((real, "real"), (generated, "generated")):
        count = len(side.features)
        if count < FEW_TILES:
            few = f"{count:,} {name} tiles: fewer than 1,000, the numbers are noisy and biased"
            warnings.append(make_warning(f"few_{name}_tiles", few))
    # The covariance of n rows has rank n - 1 at most.
    smallest, dim = min(len(real.features), len(generated.features)), real.features.shape[1]
    if smallest <= dim:
        warnings.append(
            make_warning(
                "fewer_tiles_than_dimensions",
                f"n = {smallest:,} tiles for {dim} feature dimensions (n <= d): the covariance is "
                "singular, the Fréchet distance is mostly the bias of a small sample",
            )
        )
    return warnings + model_warnings(identity)


def seen_cohort_warnings(
    encoders: Mapping[str, str], held_out: Iterable[tuple[Dataset, Selection]]
) -> list[dict[str, str]]:
    """Held-out selections of TCGA, where an encoder was itself trained on TCGA.

    `encoders` has names by what they do here ("guides", "measures"). Slides of TCGA are those whose
    name is a barcode.
    """
    from model.encoders import ENCODERS  # torchvision takes seconds to import

    seen = {n: does for n, does in encoders.items() if n in ENCODERS and ENCODERS[n].tcga}
    held = [selection for dataset, selection in held_out if is_hold_out(dataset, selection.name)]
    names = [one.name for one in held if any(name.startswith("TCGA-") for name in one.slide_ids)]
    if not seen or not names:
        return []
    used = " and ".join(f"{name}, which {does}" for name, does in seen.items())
    message = (
        f"{', '.join(names)} holds out slides of TCGA from the generator, but not from {used}: "
        "its weights were trained on tiles of TCGA, so that these numbers are of unseen slides for "
        "the generator alone"
    )
    return [make_warning("encoder_saw_cohort", message)]


def equality_warnings(equal: Mapping[str, int], generated: int) -> list[dict[str, str]]:
    """Generated tiles that are tiles of another side, whose number is given by side."""
    warnings = []
    for name, count in equal.items():
        if count:
            what = (
                f"all {count:,} generated tiles are {name} tiles: the same set is on both sides"
                if count == generated
                else f"{count:,} of {generated:,} generated tiles are equal to {name} tiles"
            )
            warnings.append(make_warning(f"equal_{name}_tiles", what))
    return warnings


def hold_out_warnings(sides: Iterable[FeatureSide]) -> list[dict[str, str]]:
    """Patients that are on both sides of a hold-out by the table of slides as it is now.

    `sides` are of real tiles.
    """
    leaks = (leak for side in sides for leak in find_leaks(side.dataset, side.selection.name))
    return [
        make_warning("hold_out_broken", f"{leak}: numbers on these tiles are of seen patients")
        for leak in dict.fromkeys(leaks)
    ]


def model_warnings(identity: Mapping[str, object]) -> list[dict[str, str]]:
    """What makes the model doubtful, by the identity of the synthetic dataset."""
    from model.encoders import is_of_photographs  # torchvision takes seconds to import

    warnings = []
    if identity.get("model_encoder_random"):
        message = (
            "the images were made by a model that learned from an encoder with random weights: "
            "what it learned has no biological meaning"
        )
        warnings.append(make_warning("random_training_encoder", message))
    elif is_of_photographs(str(identity.get("guidance_encoder"))):
        message = (
            f"the images were guided by features of {identity['guidance_encoder']}, which was "
            "trained on photographs, not on tissue"
        )
        warnings.append(make_warning("photograph_guidance", message))
    for key, code in (("forced_guidance", "forced_guidance"), ("generator_note", "untested")):
        if identity.get(key):
            warnings.append(make_warning(code, str(identity[key])))
    return warnings


def blockiness_warnings(described: Mapping[str, Mapping[str, object]]) -> list[dict[str, str]]:
    """A warning where one side's tiles have JPEG's 8 x 8 grid and the other's do not.

    `described` has the sides "real" and "generated" as results.json describes them.
    """
    real, generated = (
        Record(described[side], side).part("tiles").part("blockiness")
        for side in ("real", "generated")
    )
    if any(score.optional("standard_error") is None for score in (real, generated)):
        return []
    means = real.number("mean"), generated.number("mean")
    error = float(np.hypot(real.number("standard_error"), generated.number("standard_error")))
    # Twice the standard error, so that few tiles do not raise it.
    if abs(means[0] - means[1]) <= max(_BLOCKINESS_GAP, 2 * error):
        return []
    return [
        make_warning(
            "blockiness_mismatch",
            f"JPEG blockiness differs: {means[0]:.3f} of the real tiles, "
            f"{means[1]:.3f} of the generated ones (1 is no grid). One side was "
            "compressed and the other not, or differently: distances measure that as well",
        )
    ]


def fault_warnings(faults: Sequence[InputFault], failed: Mapping[str, str]) -> list[dict[str, str]]:
    """What is wrong with the inputs, and what could not be computed, by name with its reason."""
    warnings = [make_warning(f"rows_{fault.kind}", fault.message) for fault in faults]
    for name, reason in failed.items():
        title = METRICS[name].title if name in METRICS else "Real halves"
        # One place is enough to name the rows.
        is_named = any(fault.message in reason for fault in faults)
        why = "because of the rows named above" if is_named else reason
        warnings.append(make_warning("not_measured", f"{title}: not measured: {why}"))
    return warnings


def metric_warnings(
    results: Iterable[tuple[str, Mapping[str, object]]], known: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """One warning per metric and sentence, with the places where it applies.

    `results` are (place, results by metric), the place "" where there is only one. The code is
    `metric_` and the metric's name. `known` are the warnings given already: a sentence of a kind
    that one of them covers is not repeated for each metric.
    """
    known_codes = {one["code"] for one in known}
    # A sentence of many places is one warning: keys keep the order in which they come.
    places: dict[tuple[str, str], dict[str, None]] = {}
    for place, metrics in results:
        for name, sentence in _read_sentences(metrics):
            kinds = METRICS[name].warnings if name in METRICS else ()
            if not any(k.covered_by in known_codes and k.matches_sentence(sentence) for k in kinds):
                places.setdefault((name, sentence), {})[place] = None
    titles = {metric.name: metric.title for metric in METRICS.values()}
    titles |= {part.name: part.title for metric in METRICS.values() for part in metric.parts}
    warnings = []
    for (name, sentence), named in places.items():
        shown, more = list(named)[:_PLACES_NAMED], len(named) - _PLACES_NAMED
        where = "; ".join(shown) + (f" and {more} more" if more > 0 else "")
        message = f"{titles.get(name, name)}: {sentence}" + (f" ({where})" if where else "")
        warnings.append(make_warning(f"metric_{name}", message))
    return warnings


def _read_sentences(metrics: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(metric or part, sentence) of all warnings within results."""
    for name, result in metrics.items():
        if not isinstance(result, Mapping):
            continue
        record = Record(result, name)
        yield from ((name, sentence) for sentence in record.texts("warnings"))
        for part in METRICS[name].parts if name in METRICS else ():
            sentences = record.part(part.key).texts("warnings")
            yield from ((part.name, sentence) for sentence in sentences)
