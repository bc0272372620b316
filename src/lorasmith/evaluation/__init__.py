"""answers of a Chat + reference answers -> how many are right, and which."""
