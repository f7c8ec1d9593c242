"""Find, inspect, load and run the teacher, with hooks."""
