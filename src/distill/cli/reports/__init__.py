"""What a command measures and prints, and the files that it writes."""
