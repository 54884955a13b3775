"""How good a plan is: bounds, balance, priced time, comparison."""
