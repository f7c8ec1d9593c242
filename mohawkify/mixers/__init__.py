"""Mixers: the modules that replace attention, registered by kind (kinds.py)."""
