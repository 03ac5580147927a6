"""What push_to_hub.py publishes beside the weights."""
