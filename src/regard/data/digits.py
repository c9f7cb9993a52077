"""Real handwritten digits that travel inside scikit-learn: 1 797 grey pictures of 8 x 8, ink 0..16, ten classes."""

import numpy as np
import torch

from ..errors import RegardError
from .batch import Batch, FixedData

SIDE = 8
VOCABULARY = 17  # ink 0..16


def digits(*, tokens: bool = False, seed: int = 0) -> FixedData:
    """Three quarters for training, a quarter for test, the same share of each digit in both.

    Args:
        tokens: `x` (B, 64) ink levels row by row, instead of the map (B, 1, 8, 8) in 0..1.
        seed: of the split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RegardError("the digits come with scikit-learn, which is not installed; run: pip install 'regard[bench]'") from None
    pictures, labels = load_digits(return_X_y=True)
    levels, classes = torch.from_numpy(np.asarray(pictures)).long(), torch.from_numpy(np.asarray(labels)).long()
    x = levels if tokens else (levels.float() / (VOCABULARY - 1)).view(-1, 1, SIDE, SIDE)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(len(classes), dtype=torch.bool)
    for digit in range(10):
        members = order[classes[order] == digit]
        held_out[members[: len(members) // 4]] = True
    whole = Batch(x, classes)
    return FixedData(whole.pick(order[~held_out[order]]), whole.pick(order[held_out[order]]))
