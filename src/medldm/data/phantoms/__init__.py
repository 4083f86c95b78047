"""Draws synthetic subjects in the raw layouts of real datasets, and points in a plane, for the demo and the
tests.
"""
