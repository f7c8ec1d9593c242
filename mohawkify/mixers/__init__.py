"""Mixers: the modules that replace attention."""
