"""Scaling studies: many runs of a sweep, and the curves through what they reach."""
