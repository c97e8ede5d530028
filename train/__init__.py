"""Programs: everything that owns data, time or files."""
