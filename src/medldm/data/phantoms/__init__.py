"""Synthetic subjects, drawn in the raw layouts of real datasets or as points, for the demo and the tests."""
