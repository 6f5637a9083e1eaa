"""What MAX needs: sessions, compilation, artifacts, caches, CUDA's libraries."""
