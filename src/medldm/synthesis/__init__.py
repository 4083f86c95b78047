"""The parts of `medldm sample`: its request, its provenance and its files."""
