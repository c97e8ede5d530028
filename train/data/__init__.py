"""Datasets: prepared once, read without TensorFlow, batched by seed and step."""
