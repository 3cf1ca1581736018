"""Detectors behind one grammar: `two_stage.FasterRCNN`, `one_stage.RetinaNet`, `mask_rcnn.MaskRCNN`, and the lazy Views they open.

Nothing is imported here, so that naming a constructor in a config file costs nothing before it is built.
"""
