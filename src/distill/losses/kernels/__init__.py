"""Fast forms of the losses' mathematics, equal to the plain ones but for rounding."""
