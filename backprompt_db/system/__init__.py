"""What everything else stands on: the operating system, and points at which tests make a process fail."""
