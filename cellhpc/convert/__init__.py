"""Raw fields to 8-bit tiles.

`planning` makes a `plan`, which is data; `tasks` are what workers do; `bases` finds out what a plate is normalised by;
`execute` carries out a plan, `running` its jobs, on Dask's `workers`; `tables` indexes what was made; `archiving` sees
that all of it is in the archive, if there is one.
"""

from cellhpc.convert.execute import convert
from cellhpc.convert.plan import ConversionPlan
from cellhpc.convert.planning import plan_conversion

__all__ = ["ConversionPlan", "convert", "plan_conversion"]
