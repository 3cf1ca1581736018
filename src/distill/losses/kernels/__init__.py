"""Fast forms of the losses' mathematics. They equal the plain forms up to rounding."""
