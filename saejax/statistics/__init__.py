"""Statistics: resampling, rank tests, corrections. Pure functions that import nothing of ours."""
