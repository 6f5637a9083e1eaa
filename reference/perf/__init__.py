"""How fast the blocks are: processes that time them, what limits them, and the gate that compares two revisions."""
