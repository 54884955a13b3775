"""Ways to place experts, and the door to all of them by name."""
