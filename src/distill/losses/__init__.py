"""Distillation losses, one file per method. Nothing is imported here, so naming one in a config file costs nothing."""
