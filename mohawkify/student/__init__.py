"""The student: the teacher's own model with Discrete Mamba-2 mixers in place of attention."""
