"""What `medldm doctor` looks at: software, devices, kernels, room, weights and the cluster."""
