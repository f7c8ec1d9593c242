"""Families of teachers: the description in a file of `adapters/`, and the detection of families without one."""
