"""The op table: what the compiler knows of every operator, one row each."""
