"""What the optimizers cost beside their rivals: `python -m benchmarks` measures, `benchmarks/README.md` is the ledger."""
