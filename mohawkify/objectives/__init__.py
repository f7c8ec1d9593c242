"""The objectives of stages, such as those of orient, align and distill: one file each."""
