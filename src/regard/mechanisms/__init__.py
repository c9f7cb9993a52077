"""One file per mechanism, one folder per family. A file's name is its id; nothing here imports a sibling."""
