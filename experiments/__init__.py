"""What makes the committed results: see README.md beside this file."""
