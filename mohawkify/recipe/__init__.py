"""Recipes: the schema, reading and overriding, and what each key accepts."""
