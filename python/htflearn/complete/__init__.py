"""Completion of a user's own tensor: what ``htf complete`` does."""
