"""Token reduction: fewer image tokens in the place of many, and the way back. One method a file."""
