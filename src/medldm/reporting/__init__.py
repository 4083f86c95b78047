"""What `medldm report` does: one HTML page of runs, of an evaluation, or of two evaluations compared."""
