"""Adapters: their types, the algebra of their Deltas, the orthogonal basis, and their file."""
