"""What each notebook must find, small and as committed: a module for each number."""
