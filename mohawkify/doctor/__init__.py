"""What is installed, and whether a folder is sound."""
