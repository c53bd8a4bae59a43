"""Posteriors for weights that were trained with something else."""
