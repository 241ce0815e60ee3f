"""The passes: rewrites of a `Program`, each with the fidelity it declares, and the pipeline."""
