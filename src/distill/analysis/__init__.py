"""Comparison of finished runs, analysis of one run, and the statistics behind both."""
