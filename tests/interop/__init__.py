"""Real clients, as users have them, against a real server."""
