"""What a change makes of the code that is compiled for a GPU: kernels added, gone and changed, by block."""
