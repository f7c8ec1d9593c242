"""Checks of the installation and of folders."""
