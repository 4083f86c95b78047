"""Reads files as scanners, programs and people leave them: image formats, voxel grids, tables, folder
layouts, and an inventory of what a raw folder holds.
"""
