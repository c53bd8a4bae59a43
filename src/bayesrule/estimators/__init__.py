"""Estimates of expectations and curvatures, and the oracles that they ask."""
