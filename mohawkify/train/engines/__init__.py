"""Engines: gradients and optimiser behind one interface."""
