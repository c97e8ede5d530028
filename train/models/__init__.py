"""Models in plain Flax, none of which knows that it may be held in low rank."""
