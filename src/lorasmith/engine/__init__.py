"""What makes the step fast. Each part is exact against the plain path and can be switched off."""
