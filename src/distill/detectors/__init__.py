"""Detectors behind one grammar, a family a file (`two_stage`, `mask_rcnn`, `one_stage`, `anchor_free`), and their lazy Views.

Nothing is imported here, so that naming a constructor in a config file costs nothing before it is built.
"""
