"""Frameworks that host the training: what they need beyond the optimizer itself."""
