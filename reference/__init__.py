"""The judge: what is right, and how far from right is still right."""
