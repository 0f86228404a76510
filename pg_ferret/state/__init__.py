"""State that all workers share, so that any of them can serve any request."""
