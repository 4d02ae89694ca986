"""Rows from files, the hub and sources of one's own, as conversations."""
