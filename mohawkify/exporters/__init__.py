"""Write a finished student in the formats people run; `TARGETS` in export.py lists them."""
