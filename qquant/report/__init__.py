"""What is known of a build: the record, and its views for people, browsers and automation."""
