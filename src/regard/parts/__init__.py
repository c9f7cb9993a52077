"""Small modules that two or more mechanisms use."""
