"""Images: reading of files, conversion to tensors, resize and padding."""
