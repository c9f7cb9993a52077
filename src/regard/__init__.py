"""regard: attention mechanisms for PyTorch, equal to their authors' code, fast, and compared on your problem.

>>> import regard, torch
>>> block = regard.create("multi_head", dim=64, num_heads=4)
>>> block(torch.zeros(2, 10, 64)).shape
torch.Size([2, 10, 64])
"""

from .card import Card, Paper
from .errors import RegardError
from .mechanism import Mechanism
from .official import load_official, to_official
from .ops._dispatch import explain, use_impl
from .ops.attention_losses import doubly_stochastic_loss, hard_attention_loss
from .ops.softmax_attention.hypercube import hypercube_layout, nip
from .parts.feature_bank_store import FeatureBank
from .parts.prior_maps import context_pool
from .plotting import plot_gates, plot_pattern
from .registry import card, cards, cite, create, ids
from .rows import attend_rows

__version__ = "0.1.0"
__all__ = [
    "Card",
    "FeatureBank",
    "Mechanism",
    "Paper",
    "RegardError",
    "attend_rows",
    "card",
    "cards",
    "cite",
    "context_pool",
    "create",
    "doubly_stochastic_loss",
    "explain",
    "hard_attention_loss",
    "hypercube_layout",
    "ids",
    "load_official",
    "nip",
    "plot_gates",
    "plot_pattern",
    "to_official",
    "use_impl",
]
