"""Arithmetic on posteriors: models merged, taken out again, and weighed against one another without training."""
