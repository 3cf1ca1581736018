"""The bench: what distillation costs, part by part, measured in one process.

Each round measures every part once, and a ratio is the median of the ratios of all rounds. A machine that slows down for a
while slows all parts of a round alike, so that the ratios stay reliable.
"""
