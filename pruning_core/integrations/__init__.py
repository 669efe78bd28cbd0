"""Other libraries' loops and files; each imported when first used."""
