"""Runs: the plan of one, its assembly and resume; its teacher, its baseline and other related runs; sweeps."""
