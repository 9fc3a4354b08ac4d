"""Numbers and findings of a study as a reader sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellhpc.report.compounds import Saying


_NO_BREAK = "\u00a0"


def p_value(p: float) -> str:
    """Write a p-value with two digits that count; very small ones as a bound."""
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:#.2g}" if p < 0.995 else "1"


def points(difference: float) -> str:
    """Write a difference of shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−") if round(1000 * difference) else "0.0"


def short_probability(p: float) -> str:
    """Write a probability with two digits and without the zero that they all begin with."""
    return "1" if p >= 0.995 else f"{p:.2f}".removeprefix("0")


def sentence_case(words: str) -> str:
    """Begin with a capital letter; the others stay as they are."""
    return words[:1].upper() + words[1:]


def of_label(models: Sequence[Mapping[str, Any]], label: str) -> list[Mapping[str, Any] | None]:
    """Look up the entry of a label in `by_label` of each model; None where a model has none."""
    return [next((row for row in model["by_label"] if row["label"] == label), None) for model in models]


def wrong_calls(sayings: Sequence[Saying]) -> str:
    """Tell what models call a treatment that are wrong: each call once, with the models that say so."""
    by_call: dict[str, list[str]] = {}
    for said in sayings:
        by_call.setdefault(said.call, []).append(said.model)
    return ". ".join(f"Called {call} by {'; '.join(models)}" for call, models in by_call.items()) + "."


def compared(comparison: Mapping[str, Any]) -> str:
    """Tell in a sentence how two models differ: an entry of `comparisons` in `scores.json`."""
    interval, p = comparison["bootstrap95"], p_value(comparison["p_value"])
    spread = f" (95 % interval {points(interval[0])} to {points(interval[1])})" if interval else ""
    p = (f"p {p}" if "<" in p else f"p = {p}").replace(" ", _NO_BREAK)
    return (
        f"{_against(comparison['a'], comparison['b'])}: {points(comparison['difference'])} points{spread}, "
        f"{p}, paired over {comparison['compounds']} {comparison['units']}."
    )


def one_network(comparison: Mapping[str, Any]) -> bool:
    """Tell whether two models are the same network from different initialisations."""
    a, b = comparison["a"].rpartition(", ")[0], comparison["b"].rpartition(", ")[0]
    return bool(a) and a == b


def _against(a: str, b: str) -> str:
    """Name two models; where only the initialisation differs, the network once."""
    network, _, start = a.rpartition(", ")
    other, _, other_start = b.rpartition(", ")
    return f"{network}, {start} against {other_start}" if network == other else f"{a} against {b}"


def right_at(curve: Sequence[Mapping[str, float]], coverage: float) -> float | None:
    """Share that is right among the surest part of the treatments.

    Parameters
    ----------
    curve
        Points of `rejection.curve`: `coverage` and `risk`, the share that is wrong among those.
    coverage
        How large a part is kept. The largest one of the curve that isn't larger counts.

    Returns
    -------
    float or None
        None where the curve has no point so low.
    """
    kept = [point for point in curve if point["coverage"] <= coverage + 1e-9]
    return 1 - max(kept, key=lambda point: point["coverage"])["risk"] if kept else None
