"""Checking and storing keys and values that the user computed."""
