"""Diagnostics: what a run will do, what a step costs, and a failed step done again."""
