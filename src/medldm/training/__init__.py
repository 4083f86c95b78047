"""The parts of `medldm train`: the run, its data and module, checks beforehand, and the trainer."""
