"""Complete small programs on real data, each short enough to read top to bottom; ``bayesrule train`` runs them."""
