"""Weights in files: measured, and drawn."""
