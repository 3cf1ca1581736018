"""Evaluation: :class:`distill.evaluation.coco.CocoMetric` and :class:`distill.evaluation.voc.VocMetric`."""
