"""Ratios measured within one interleaved run, never absolute times; results are kept beside the scripts."""
