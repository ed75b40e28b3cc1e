"""Processing, modelling, reporting."""
