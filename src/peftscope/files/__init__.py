"""Reading and writing files: strict, atomic, locked, with checksums."""
