"""prompt recipe + weights -> answers. ``Chat`` in chat.py is the one object that every front end uses."""
