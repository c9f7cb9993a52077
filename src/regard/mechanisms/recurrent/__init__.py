"""Cells with gates: whole sequences, single steps, and the gates to look at."""
