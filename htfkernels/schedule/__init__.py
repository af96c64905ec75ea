"""What is computed for which samples: index plans, and the nodes that backends launch."""
