"""What every real cross-silo run needs; the two engines below stand on it."""
