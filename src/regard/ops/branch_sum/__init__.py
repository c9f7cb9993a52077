"""Branches that lie in one tensor, weighted channel by channel and added."""

from .api import branch_sum

__all__ = ["branch_sum"]
