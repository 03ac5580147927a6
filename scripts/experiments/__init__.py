"""What the commands experiment_*.py share."""
