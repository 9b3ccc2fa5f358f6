"""Steps from one program to the next, each checked before and after."""
