"""Recipes (YAML) and the one schema they follow; imports neither torch nor anything of ours."""
