"""Recurrent cells over whole sequences: torch's fused kernels, a hand-differentiated loop that gives the gates, and the plain definition."""

from .api import run, step
from .cells import LSTM, Cell

__all__ = ["LSTM", "Cell", "run", "step"]
