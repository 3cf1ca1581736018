"""Detectors behind one grammar: `two_stage.FasterRCNN`, `one_stage.RetinaNet`, `anchor_free.FCOS`, and their lazy Views.

Nothing is imported here, so that naming a constructor in a config file costs nothing before it is built.
"""
