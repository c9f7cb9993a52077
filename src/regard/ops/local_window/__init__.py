"""A neighbourhood for every pixel: logits of its neighbours, sums of them with given weights, networks on pairs and patches, attention to it."""

from .api import Window, carafe, window_apply, window_attention, window_attention_weights, window_relate
from .relations import RELATIONS, Pairs, Patches, Relation, check_reach, inside_map, pad, pair_differences, relate, window_dots

__all__ = [
    "RELATIONS",
    "Pairs",
    "Patches",
    "Relation",
    "Window",
    "carafe",
    "check_reach",
    "inside_map",
    "pad",
    "pair_differences",
    "relate",
    "window_apply",
    "window_attention",
    "window_attention_weights",
    "window_dots",
    "window_relate",
]
