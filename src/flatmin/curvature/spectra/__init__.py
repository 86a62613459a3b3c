"""Eigenvalues and the spectral density, by Lanczos iteration."""
