"""Write a finished student in the formats people run."""
