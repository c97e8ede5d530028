"""What low rank costs and saves, timed: python -m train.bench --suite SUITE."""
