"""Measures that callbacks and commands share."""
