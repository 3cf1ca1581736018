"""The command line: commands, reports of what they measured, runs, and the configuration."""
