"""What is typed: one file for each command. A command reads its words, and calls the layers below."""
