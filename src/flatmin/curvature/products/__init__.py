"""Matrices over parameter space as products with vectors: how each is computed, and in what."""
