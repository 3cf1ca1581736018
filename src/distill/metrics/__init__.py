"""Evaluation: :class:`distill.metrics.coco.CocoMetric` and :class:`distill.metrics.voc.VocMetric`."""
