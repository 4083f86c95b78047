"""Raw cases become prepared HDF5 files on one grid and in one range, with an index and a split."""
