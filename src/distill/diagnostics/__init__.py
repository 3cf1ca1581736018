"""Diagnostics: checks before a run, costs of a training step, and the replay of a failed step."""
