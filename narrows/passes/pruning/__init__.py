"""How a program is pruned: the stages, and the form that their choices ask for."""
