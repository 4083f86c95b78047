"""Networks and their parts, by one code path for 2D and 3D: autoencoders, U-Nets, quantisers,
discriminators.
"""
