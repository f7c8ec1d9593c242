"""Measure a student against its teacher."""
