"""Pooling by distance: every position takes a mean of its neighbours under a Gaussian window of its own width, each neighbour with its own weight."""

from .api import distance_pool, distance_weights
from .reference import LOWEST

__all__ = ["LOWEST", "distance_pool", "distance_weights"]
