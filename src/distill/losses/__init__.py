"""Distillation losses, one file per method. Nothing is imported here, so a config loads only its own losses."""
