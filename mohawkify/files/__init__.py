"""Files: the only code that writes them, and what is checked when they are read."""
