"""The engines: pure functions on tensors, without parameters.

A folder is one operation. `api.py` checks and chooses, `reference.py` is the truth in plain torch, other files are faster ways to the same
numbers and never import one another.
"""

from .deform import deform_conv2d, deform_unfold
from .deformable_weights import deformable_attention_weights

__all__ = ["deform_conv2d", "deform_unfold", "deformable_attention_weights"]
