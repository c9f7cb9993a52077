"""A gate over a whole map from one number a channel and one number a position."""

from .api import apply_outer_gate, outer_gate

__all__ = ["apply_outer_gate", "outer_gate"]
