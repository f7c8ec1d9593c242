"""The method (trainer.py), its steps (loop.py), their learning rate (schedule.py), checkpoints and engines."""
