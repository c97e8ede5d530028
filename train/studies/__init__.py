"""Measurements that are made once and published: many runs, one table."""
