"""Training: the LightningModule, the schedule, non-finite steps, the classifier of DICOD, and callbacks."""
