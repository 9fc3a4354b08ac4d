"""What is shown of a study's scores: a table for the terminal, and one HTML page that needs no network.

`closing` makes the table; `page` fills the templates in `templates/` with the document of `scores.json` (see
`cellhpc.aggregate`), what `compounds` tells of each compound, and the sentences of `words`. Style, script and pictures
are in the page itself. Whatever a document doesn't hold (uncertainty, comparisons, ...) has no section.
"""

from __future__ import annotations

from cellhpc.report.closing import render_scores
from cellhpc.report.page import render_report

__all__ = ["render_report", "render_scores"]
