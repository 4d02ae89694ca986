"""Measures and fingerprints that callbacks and commands share."""
