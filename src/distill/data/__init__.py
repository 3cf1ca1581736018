"""Data sources, their checks, and the loaders that turn annotated images into Batches."""
