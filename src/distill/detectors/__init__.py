"""Detectors and their lazy Views, one file per family: `faster_rcnn`, `mask_rcnn`, `retinanet`, `fcos`.

Nothing is imported here, so that naming a constructor in a configuration costs nothing before the detector is built.
"""
