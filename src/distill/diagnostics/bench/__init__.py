"""The bench: measurements of the cost of distillation, part by part, in one process.

Each round measures every part once. A ratio is the median of the ratios of all rounds. If the machine slows down for
some time, all parts of a round slow down alike, so that the ratios stay reliable.
"""
