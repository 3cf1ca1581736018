"""From annotated files, or from nothing, to Batches."""
