"""The paper's experiments in small, on the embedded world: what is run, how, and what came out (../RESULTS.md)."""
