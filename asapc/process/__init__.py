"""What the system gives a process and takes back: signals, temporary folders, standard streams."""
