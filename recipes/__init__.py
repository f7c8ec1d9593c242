"""The shipped recipes: one flat YAML file each."""
