"""The rule as torch optimizers: one shell, and constructors that fill its slots."""
