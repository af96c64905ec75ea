"""The commands of ``htf``, one module each, loaded when called."""
