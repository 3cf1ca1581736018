"""Comparison of finished runs, and the statistics behind it."""
