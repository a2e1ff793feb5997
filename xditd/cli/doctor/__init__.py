"""`xditctl doctor`: is everything here that the daemon needs, and what would cure what is not."""
