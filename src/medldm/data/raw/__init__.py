"""Files as scanners, programs and people leave them: formats, grids, tables, folder layouts, inventory."""
