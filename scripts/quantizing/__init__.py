"""What quantize.py does: a snapshot's tensors read, brought to few bits and written, in order."""
