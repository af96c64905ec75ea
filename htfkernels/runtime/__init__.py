"""Which backend runs an operation, and how it is differentiated."""
