"""What a schedule's operations do, for one layer shape: one program a family of methods."""
