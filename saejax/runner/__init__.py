"""Flags and settings, units of a workdir, processes: what connects the library to the command line."""
