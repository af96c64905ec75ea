"""Locality: how far a network sees, and data that asks it to see far."""
