"""What the tests stand on: a real server, real clients, deadlines.  Nothing here is a test."""
