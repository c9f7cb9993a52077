"""The checks, by what they look at. Importing this package registers them all."""

from . import batch, contract, cost, masks, numerics, order, tools

__all__ = ["batch", "contract", "cost", "masks", "numerics", "order", "tools"]
