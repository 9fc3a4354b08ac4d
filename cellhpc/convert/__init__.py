"""Raw fields to 8-bit tiles: plan (what will be done), tasks (done by workers), tables (the index), execute (Dask)."""

from cellhpc.convert.execute import Conversion, convert
from cellhpc.convert.plan import ConversionPlan, plan_conversion

__all__ = ["Conversion", "ConversionPlan", "convert", "plan_conversion"]
