"""Output folders: claimed by one build, written so that a kill at any moment leaves all or nothing."""
