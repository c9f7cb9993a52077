"""Gather, relate, distribute: every position of a map draws on the whole map, through all pairs or through a cheaper route."""
