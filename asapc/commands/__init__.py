"""One file a verb of the command line: the line from a file to what it becomes, top to bottom."""
