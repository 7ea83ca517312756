"""What carries a chunk from rank to rank."""
