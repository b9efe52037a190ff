"""Comparisons of several methods, and the jobs that they run side by side."""
