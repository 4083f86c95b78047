"""What `medldm train` puts together: the run, its data and module, the trainer, and checks beforehand."""
