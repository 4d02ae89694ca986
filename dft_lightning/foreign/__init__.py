"""What this package changes in other packages, and where it reaches into their private parts, each with its reason."""
