"""A map pooled to a few regions, and regions spread over a map again: what pyramid heads are made of."""

from .api import pool_boxes, pool_regions, pool_windows, spread_convolved, spread_regions

__all__ = ["pool_boxes", "pool_regions", "pool_windows", "spread_convolved", "spread_regions"]
