"""Recurrent cells over whole sequences: torch's fused kernels, a loop with its own derivative that shows the gates, the plain definition."""

from .api import run, step
from .cells import LSTM

__all__ = ["LSTM", "run", "step"]
