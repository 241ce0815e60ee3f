"""The intermediate representation: programs, the op table, the channel analysis, the rewriter."""
