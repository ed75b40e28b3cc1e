"""Three models that tell whose wine it is."""
