"""A neighbourhood per pixel: attention or reassembly over a window. The window code lives in `ops/local_window`."""
