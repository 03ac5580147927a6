"""What generate.py and chat.py are made of."""
