"""Find, build and load the kernels of the layer's operators."""
