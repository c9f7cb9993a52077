"""Token mixers: every position of a sequence (batch, positions, dim) gathers from others.

All share the signature of `multi_head` and differ in what replaces the softmax over all pairs: a pattern (`sparse`), a feature map whose
products can be taken right to left (`efficient`, `performer`), or a short memory that all pairs go through (`luna`).
"""
