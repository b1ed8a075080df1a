"""The stages, one file each: settings, inputs, and the functions that do the work."""
