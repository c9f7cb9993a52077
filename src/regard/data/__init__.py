"""Tasks' data: exact generators, and readers of real data that ships inside ordinary packages."""
