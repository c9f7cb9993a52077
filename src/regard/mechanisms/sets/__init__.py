"""Attention on unordered sets (batch, elements, dim): blocks of the Set Transformer.

`mab` is the block, `sab` a set with itself, `isab` through learned inducing points, `pma` pools to a few vectors, `set_transformer` is the model.
"""
