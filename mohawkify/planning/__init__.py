"""Plans: steps, FLOPs, memory, disk, time and cost."""
