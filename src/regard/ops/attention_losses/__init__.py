"""Losses on attention weights: the doubly stochastic regulariser, and the learning rule of hard attention."""

from .api import doubly_stochastic_loss, hard_attention_loss

__all__ = ["doubly_stochastic_loss", "hard_attention_loss"]
