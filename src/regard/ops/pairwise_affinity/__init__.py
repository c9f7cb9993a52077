"""Every query gathers from every key: softmax, scaled dot-product and additive-relu affinities, none of which stores the N x M weights."""

from .api import affinity_weights, pairwise_attention, pairwise_dot, pairwise_relu

__all__ = ["affinity_weights", "pairwise_attention", "pairwise_dot", "pairwise_relu"]
