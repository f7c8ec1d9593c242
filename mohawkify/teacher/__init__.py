"""Find, inspect, load and listen to the teacher."""
