"""Objects and the relations between all pairs of them, each refined by the other: residues and their alignment, their pairs, their frames."""
