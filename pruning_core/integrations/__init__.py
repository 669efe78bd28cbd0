"""Other libraries' own loops and files. Each is imported only when it is asked for."""
