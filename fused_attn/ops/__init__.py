"""The operations: one folder each, the same file names in all."""
