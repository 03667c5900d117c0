"""The operations that are measured: sizes, inputs, formula, counting, and our own sides."""
