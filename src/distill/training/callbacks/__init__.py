"""Lightning callbacks: checkpoints, checks and logging around the training steps."""
