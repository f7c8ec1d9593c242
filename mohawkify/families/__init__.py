"""Families of teachers: what a file in `adapters/` says, and how a family without one is recognised."""
