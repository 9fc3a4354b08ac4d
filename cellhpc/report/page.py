"""The page of a study: the templates, filled with its scores, figures and tiles."""

from __future__ import annotations

import base64
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
import pandas as pd

from cellhpc import figures
from cellhpc.gallery import PER_TREATMENT, TILE_PX, Gallery
from cellhpc.grid import describe
from cellhpc.report import words
from cellhpc.report.compounds import SET_AT, SHOWN_FROM, Compound, compounds_of
from cellhpc.scores import percent

SHOWN_LEVELS = ("treatment", "compound", "well", "field", "tile")
PAGE_BYTES = 4_900_000
"""The page is no larger: first tiles are left out, then sections of compounds, then rows of long tables."""
FIGURES_BYTES = 3_600_000
"""Bytes of the figures on the page; those that don't fit are linked, the files lie beside it."""

_EVER_LESS: tuple[tuple[str, int | None, int], ...] = (
    *((sections_of, None, FIGURES_BYTES) for sections_of in ("all", "wrong", "none")),
    *(("none", rows, FIGURES_BYTES) for rows in (1000, 300, 100, 30)),
    ("none", 30, 0),
)
"""Which compounds have a section, how many rows long tables have, and bytes of figures, until the page is small."""
_SETTING_LETTERS = 1000
"""Letters of a setting on the page, at most."""

REPEAT_SHOWN = 20
"""Treatments of a model that the page ranks for repetition; a table beside it has all."""

_MAY_LACK: dict[str, dict[str, Any]] = {
    "scores": {
        "comparisons": [],
        "ensembles": [],
        "table": None,
        "folds": None,
        "runs": None,
        "search": [],
        "quality": {},
        "settings": {},
        "curves_combined": ["mean"],
    },
    "provenance": {"runs": None, "submissions": [], "aggregate": None},
    "model": {"macro": None, "by_label": None, "spread": None, "uncertainty": None, "cost": None},
    "uncertainty": dict.fromkeys(("calibration", "conformal", "decomposition", "rejection", "repeat", "unknown")),
}
"""What a document may lack, as that of predictions that no run of ours made."""


def render_report(
    scores: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    tables: Mapping[str, pd.DataFrame] | None = None,
    p_values: Mapping[str, pd.DataFrame] | None = None,
    gallery: Gallery | None = None,
) -> str:
    """Write the HTML page of a study.

    Parameters
    ----------
    scores
        The document of `scores.json`.
    pictures
        PNG files by name: `confusion`, `learning-curves`, `confusion-<slug>` of each model, and perhaps `montage`,
        `reliability`, `conformal` and `rejection`. The files themselves lie beside the page.
    tables
        Tables of treatments (`scores.combine(...)["treatment"]`) by the slug of the model, for the compounds' sections.
    p_values
        Of each treatment and class the conformal p-values `marginal_<class>`, by the slug of the model.
    gallery
        Tiles of the treatments that were called wrong.

    Returns
    -------
    str
        A whole HTML document of at most `PAGE_BYTES`; nothing in it is fetched from elsewhere.
    """
    document = _filled(scores)
    known = {
        "scores": document,
        "levels": [level for level in SHOWN_LEVELS if any(level in model["levels"] for model in document["models"])],
        "several": max(len(model["seeds"]) for model in document["models"]) > 1,
        "settings": dict(_flat(document["settings"])),
        "chosen": _chosen(document["search"]),
        "curves_caption": figures.curves_caption(document["curves_combined"]),
        "confusion_caption": figures.CONFUSION_CAPTION,
        "shown_from": SHOWN_FROM,
        "set_at": SET_AT,
        "page_mb": round(PAGE_BYTES / 1e6),
        "repeat_shown": REPEAT_SHOWN,
        "tile_px": TILE_PX,
        "per_treatment": PER_TREATMENT,
    }
    template = _environment().get_template("page.html.j2")

    embedded = functools.cache(functools.partial(_embedded, pictures))

    def rendered(shown: Gallery, compounds: Sequence[Compound], sections_of: str, rows: int | None, room: int) -> str:
        told = [one if _has_section(one, sections_of) else replace(one, treatments=()) for one in compounds]
        told_of = {**_of_compounds(told, rows), **embedded(room)}
        return template.render(**known, **told_of, sections_of=sections_of, rows=rows, gallery=shown)

    def compounds(shown: Gallery) -> Sequence[Compound]:
        return compounds_of(document, tables or {}, p_values or {}, shown)

    whole = gallery or Gallery()
    without = whole.within(0)
    known_of_all = compounds(without)
    for less in _EVER_LESS:
        page = rendered(without, known_of_all, *less)
        if (room := PAGE_BYTES - len(page.encode())) >= 0:
            break
    while whole.shown and room > 0:
        more = rendered(shown := whole.within(room), compounds(shown), *less)
        if (over := len(more.encode()) - PAGE_BYTES) <= 0:
            return more
        room -= over  # what is said beside tiles was longer than is usual
    return page


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cellhpc.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = percent
    environment.filters["points"] = words.points
    environment.filters["p_value"] = words.p_value
    environment.filters["describe"] = describe
    environment.filters["short_p"] = words.short_probability
    environment.filters["sentence_case"] = words.sentence_case
    environment.filters["wrong_calls"] = words.wrong_calls
    environment.filters["of_label"] = words.of_label
    environment.filters["one_network"] = words.one_network
    environment.globals["compared"] = words.compared
    environment.globals["right_at"] = words.right_at
    return environment


def _filled(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Give the document null for what it lacks, so that a template can ask for it."""
    models = []
    for model in scores["models"]:
        uncertainty = model.get("uncertainty")
        told = {**_MAY_LACK["uncertainty"], **uncertainty} if uncertainty else None
        by_seed = {seed: {"folds": None, **entry} for seed, entry in model["by_seed"].items()}
        models.append({**_MAY_LACK["model"], **model, "by_seed": by_seed, "uncertainty": told})
    provenance = {**_MAY_LACK["provenance"], **scores["provenance"]}
    return {**_MAY_LACK["scores"], **scores, "provenance": provenance, "models": models}


def _has_section(compound: Compound, sections_of: str) -> bool:
    """Tell whether a compound is told of in a section, where not all of them may fit into the page."""
    return sections_of == "all" or (sections_of == "wrong" and compound.correct < compound.total)


def _of_compounds(compounds: Sequence[Compound], rows: int | None) -> dict[str, Any]:
    """Tell the templates of compounds, of which the index has so many, and what there is: sections, sets, maps."""
    treatments = [treatment for compound in compounds for treatment in compound.treatments]
    names = Counter(treatment.name for treatment in treatments)
    return {
        "compounds": compounds,
        "anchor_of": {(one.name, one.label): one.anchor for one in compounds[:rows]},
        "sections": bool(treatments),
        "repeated": {name for name, count in names.items() if count > 1},
        "with_sets": any(said.labels is not None for treatment in treatments for said in treatment.sayings),
        "with_maps": any(tile.map_jpeg for treatment in treatments for tile in treatment.tiles),
    }


def _embedded(pictures: Mapping[str, bytes], room: int) -> dict[str, Any]:
    """Encode the figures for the page, those of single models and the montage last, as long as there is room."""
    later = [name for name in pictures if name.startswith("confusion-")] + ["montage"]
    order = [name for name in pictures if name not in later] + [name for name in later if name in pictures]
    found, linked = {}, []
    for name in order:
        size = 4 * len(pictures[name]) // 3
        if size <= room:
            found[name] = _picture(pictures[name])
            room -= size
        else:
            linked.append(name)
    return {"pictures": found, "linked": linked}


def _chosen(search: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Count the runs that chose the same, the commonest choice first."""
    return Counter(describe(run["values"]) for run in search).most_common()


def _picture(png: bytes) -> dict[str, Any]:
    """Encode a PNG for the page, with the width (CSS pixels, 96 in an inch) at which its letters have their size."""
    width_px = int.from_bytes(png[16:20], "big")  # of the PNG's first chunk, IHDR
    return {"data": base64.b64encode(png).decode("ascii"), "width": round(width_px * 96 / figures.DPI)}


def _flat(document: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Pairs `section.key`, value of nested settings."""
    pairs: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{above}{key}.")
        elif value not in (None, [], {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            cut = text if len(text) <= _SETTING_LETTERS else f"{text[:_SETTING_LETTERS]}… (all of it in scores.json)"
            pairs.append((f"{above}{key}", cut))
    return pairs
