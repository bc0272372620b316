"""The frozen base, what is trained beside it (methods.py draws it), and their files: adapter folder, run.json."""
