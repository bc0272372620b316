"""The ``lorasmith`` command. Nothing below imports torch before a command asks for it."""
