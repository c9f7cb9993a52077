"""Recurrent cells over whole sequences: torch's fused kernels, a loop with its own derivative that shows the gates, the plain definition."""

from .api import run, step
from .cells import GRU, LSTM, RNN, Cell

__all__ = ["GRU", "LSTM", "RNN", "Cell", "run", "step"]
