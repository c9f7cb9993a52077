"""Plain networks with a slot for a mechanism: attention is a constructor argument."""
