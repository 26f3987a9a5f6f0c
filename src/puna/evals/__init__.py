"""Evaluations, a file a family; they read models and write JSON."""
