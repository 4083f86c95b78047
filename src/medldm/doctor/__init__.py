"""The checks of `medldm doctor`: software, devices, kernels, memory and disks, weights, and the cluster."""
