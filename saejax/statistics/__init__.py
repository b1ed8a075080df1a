"""Statistics: resampling, rank tests, corrections, dose-effect curves. Pure functions that import nothing of ours."""
