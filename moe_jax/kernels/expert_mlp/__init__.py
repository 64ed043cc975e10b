"""The experts of a whole layer as a few kernels."""
