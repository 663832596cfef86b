"""Runs one deployment on a node, and reports it."""
