"""What distillation costs, part by part: everything in one process, measured in turn, so that ratios can be trusted.

A round takes each part once; a ratio is the median of the rounds' own ratios. So a machine that slows down for a while
slows all parts of a round alike.
"""
