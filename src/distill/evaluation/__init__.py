"""Evaluation of detectors: the metrics :class:`distill.evaluation.coco.CocoMetric`
and :class:`distill.evaluation.voc.VocMetric`.
"""
