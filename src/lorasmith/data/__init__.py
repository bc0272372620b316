"""file -> Row -> Example -> Segments -> TokenizedExample. See README.md in this folder."""
