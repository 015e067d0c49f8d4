"""What is being written, and what was: drafts, manifests, finished folders, and their verification."""
