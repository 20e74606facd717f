"""Training over several processes, one script for each engine."""
