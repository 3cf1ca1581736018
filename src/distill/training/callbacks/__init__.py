"""What happens around the training, and is no part of it."""
