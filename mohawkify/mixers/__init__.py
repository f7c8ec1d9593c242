"""Mixers: the modules that replace attention, a file per kind, with `register_mixer` of mixer.py."""
