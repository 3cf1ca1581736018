"""Detectors and their lazy Views. Each family has its own module: `faster_rcnn`, `mask_rcnn`, `retinanet`, `fcos`.

This package imports nothing here. A configuration can therefore name a constructor without importing torch.
"""
