"""Diagnostics: checks before a run, the costs of a step, and the replay of a failed step."""
