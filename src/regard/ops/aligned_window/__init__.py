"""Products of each query with a short run of keys or values that starts where the query says."""

from .api import gather_runs, run_dots, run_sums

__all__ = ["gather_runs", "run_dots", "run_sums"]
