"""Detectors in the files of other projects, as tables: file -> family, options, state dict. One file a format."""
