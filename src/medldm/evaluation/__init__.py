"""What `medldm evaluate` does: pairs images, measures them, compares them with baselines, and writes the
results.
"""
