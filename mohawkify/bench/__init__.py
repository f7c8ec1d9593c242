"""Measurements of speed and memory, errors first: operators, stages of a conversion, decoding."""
