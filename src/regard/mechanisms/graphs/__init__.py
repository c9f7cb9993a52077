"""Attention on graph nodes, modulated by a kernel that says how near two nodes are."""
