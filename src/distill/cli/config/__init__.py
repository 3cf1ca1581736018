"""From typed words to a composed and checked configuration, and from its nodes to objects."""
