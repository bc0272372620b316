"""Chat over HTTP, for many at once: requests -> rows of one batch -> OpenAI's answers. app.py has the routes."""
