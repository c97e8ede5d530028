"""What was measured, as JSON, and what a reader should conclude."""
