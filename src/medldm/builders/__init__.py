"""What `medldm.build` is made of: one builder for each kind of model (`kinds`), parts by their keys (`keys`),
and the bound on what a checkpoint may ask for (`allowance`).
"""
