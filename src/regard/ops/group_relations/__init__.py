"""Entries of a map related with all others of their group of channels, by one inner product for each group."""

from .api import relate_groups

__all__ = ["relate_groups"]
