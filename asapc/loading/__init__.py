"""From files to models and samples."""
