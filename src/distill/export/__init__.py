"""Detectors in the file formats of other programs, each with a proof that the file finds what the detector finds."""
