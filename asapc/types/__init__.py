"""The data that flows between the stages, frozen. Its methods derive, check and parse it, and run no stage."""
