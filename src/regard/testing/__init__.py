"""Checks that any attention module can be put through, and the replay of golden files."""
