"""Squeeze, excite, fuse: a map is summed up in a few numbers per channel, which gate or shift it."""
