"""From floats to integers: grids chosen on data, the passes that fold them, and what that costs."""
